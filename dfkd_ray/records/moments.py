"""Streaming per-class count, mean and co-moment of activations in float64: dense (`Moments`) or of low rank (`Sketch`).

Both are updated in place, one class at a time, and merge exactly: the record of shards is the record of the whole, in
any order. The mean of a chunk is taken after subtracting its first row, so a unit with constant values has a variance
of exactly zero and needs no threshold.

A sketch keeps C Omega in place of the co-moment C, for a fixed Gaussian matrix Omega (units x (rank + 10)) drawn from
a seed. That is linear in C, so it streams and merges like C itself, and a Nystroem approximation gives C back: exactly
where a class has at most `rank` + 1 examples, and else as well as the decay of the spectrum lets it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dfkd_ray.records.spectral import oriented

OVERSAMPLING = 10  # columns of Omega beyond the rank; Halko, Martinsson, Tropp 2011, section 4.2, take 5 or 10
TINY = 1e-12  # eigenvalues of Omega^T C Omega below this share of the largest are rounding errors
CHUNK_NUMBERS = 2**24  # of float64 copied at a time: 128 MiB


@dataclass
class Moments:
    """Counts, means and dense co-moments sum (x - mean) (x - mean)^T of each class: 8 classes units^2 bytes."""

    counts: Int64[Tensor, " classes"]
    means: Float64[Tensor, "classes d"]
    comoments: Float64[Tensor, "classes d d"]

    @classmethod
    def empty(cls, num_classes: int, num_units: int) -> "Moments":
        """Moments of no example."""
        return cls(*_empty(num_classes, num_units), _zeros(num_classes, num_units, num_units))

    def update(self, values: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        """Add examples with labels in [0, classes), in place; a refused batch (`ValueError`) changes nothing."""
        for label, chunk in _by_class(values, labels, *self.means.shape):
            count, mean, centred = _centre(chunk)
            shift, weight = _absorb(self.counts, self.means, label, count, mean)
            self.comoments[label].addmm_(centred.T, centred).addr_(shift, shift, alpha=weight)

    def merge(self, other: "Moments") -> None:
        """Add the examples of `other`, in place."""
        _require_equal("shape (classes, units)", tuple(self.means.shape), tuple(other.means.shape))
        for label in other.counts.nonzero().flatten().tolist():
            shift, weight = _absorb(self.counts, self.means, label, int(other.counts[label]), other.means[label])
            self.comoments[label].add_(other.comoments[label]).addr_(shift, shift, alpha=weight)

    def covariance(self) -> Float64[Tensor, "classes d d"]:
        """Co-moment / (count - 1) of each class; zeros for a class with one example or none."""
        result = torch.empty_like(self.comoments)
        for label, count in enumerate(self.counts.tolist()):
            # A matrix product is symmetric up to rounding only, depending on the BLAS.
            torch.add(self.comoments[label], self.comoments[label].T, out=result[label])
            result[label].div_(2 * max(count - 1, 1))
        return result


@dataclass
class Sketch:
    """Counts, means and co-moments times Omega of each class: 8 (classes + 1) units (rank + 10) bytes with Omega."""

    counts: Int64[Tensor, " classes"]
    means: Float64[Tensor, "classes d"]
    products: Float64[Tensor, "classes d columns"]
    rank: int
    seed: int

    def __post_init__(self) -> None:
        self._omega: Tensor | None = None

    @classmethod
    def empty(cls, num_classes: int, num_units: int, rank: int, seed: int) -> "Sketch":
        """A sketch of no example; sketches merge where rank and seed are equal."""
        if rank < 1:
            raise ValueError(f"the rank of a sketch is {rank}: give 1 or more")
        products = _zeros(num_classes, num_units, rank + OVERSAMPLING)
        return cls(*_empty(num_classes, num_units), products, rank, seed)

    @property
    def omega(self) -> Float64[Tensor, "d columns"]:
        """The Gaussian test matrix, a function of (seed, units, rank): drawn when first needed, never stored."""
        if self._omega is None:
            self._omega = draw_omega(self.means.shape[1], self.rank, self.seed)
        return self._omega

    def update(self, values: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        """Add examples with labels in [0, classes), in place; a refused batch (`ValueError`) changes nothing."""
        for label, chunk in _by_class(values, labels, *self.means.shape):
            count, mean, centred = _centre(chunk)
            shift, weight = _absorb(self.counts, self.means, label, count, mean)
            self.products[label].addmm_(centred.T, centred @ self.omega)
            self.products[label].addr_(shift, shift @ self.omega, alpha=weight)

    def merge(self, other: "Sketch") -> None:
        """Add the examples of `other`, in place."""
        mine, theirs = ((*sketch.means.shape, sketch.rank, sketch.seed) for sketch in (self, other))
        _require_equal("(classes, units, rank, seed)", mine, theirs)
        for label in other.counts.nonzero().flatten().tolist():
            shift, weight = _absorb(self.counts, self.means, label, int(other.counts[label]), other.means[label])
            self.products[label].add_(other.products[label])
            self.products[label].addr_(shift, shift @ self.omega, alpha=weight)

    def factor(self) -> Float64[Tensor, "classes d rank"]:
        """Factors whose F F^T approximates the covariance of each class; zeros for one example or none."""
        result = _zeros(*self.means.shape, self.rank)
        for label, count in enumerate(self.counts.tolist()):
            if count > 1:
                result[label] = nystroem(self.products[label], self.omega, self.rank).div_((count - 1) ** 0.5)
        return result


def draw_omega(num_units: int, rank: int, seed: int) -> Float64[Tensor, "d columns"]:
    """Independent N(0, 1) entries, `rank` + 10 columns: the same numbers for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_units, rank + OVERSAMPLING, dtype=torch.float64, generator=generator)


def nystroem(
    products: Float64[Tensor, "d columns"], omega: Float64[Tensor, "d columns"], rank: int
) -> Float64[Tensor, "d rank"]:
    """A factor F (units x rank) with F F^T ~ C, from Y = C Omega for a positive semi-definite C.

    C ~ Y (Omega^T Y)^+ Y^T, cut to the `rank` largest eigenvalues; columns by decreasing length, zeros where C has
    a lower rank. Source: Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data", with tiny eigenvalues dropped in place of its shift.
    """
    core = omega.T @ products
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > TINY * values[-1].clamp(min=0)
    wide = products @ (vectors[:, kept] / values[kept].sqrt())
    # Rotating by eigenvectors of the small Gram matrix changes F F^T by nothing, however badly they are conditioned.
    rotation = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :rank]
    factor = products.new_zeros(len(products), rank)
    factor[:, : rotation.shape[1]] = oriented(wide @ rotation)
    return factor


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _empty(num_classes: int, num_units: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(num_classes, dtype=torch.int64), _zeros(num_classes, num_units)


def _by_class(values: Tensor, labels: Tensor, num_classes: int, num_units: int) -> Iterator[tuple[int, Tensor]]:
    """(label, float64 copy of some of its rows); a class comes in several chunks where it is large."""
    _check(values, labels, num_classes, num_units)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        for chunk in rows.split(max(1, CHUNK_NUMBERS // max(num_units, 1))):
            yield label, values[chunk].to("cpu", torch.float64)


def _check(values: Tensor, labels: Tensor, num_classes: int, num_units: int) -> None:
    if values.shape != (len(labels), num_units):
        raise ValueError(
            f"activations have shape {tuple(values.shape)}, expected ({len(labels)}, {num_units}): one row for each "
            "label, one column for each unit of the record"
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, expected 0 to {num_classes - 1}: "
            f"the record has {num_classes} classes"
        )
    finite = values.isfinite()
    if not finite.all():
        row, unit = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{int((~finite).sum())} of {finite.numel()} activations are NaN or infinite, the first in row {row} "
            f"(class {int(labels[row])}), unit {unit}: a record needs finite activations; check the teacher and its "
            "input"
        )


def _centre(chunk: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of rows, their mean, and the rows less their mean (in place of `chunk`)."""
    first = chunk[0].clone()
    offset = chunk.sub_(first).mean(dim=0)
    return len(chunk), first + offset, chunk.sub_(offset)


def _absorb(counts: Tensor, means: Tensor, label: int, count: int, mean: Tensor) -> tuple[Tensor, float]:
    """Add `count` examples around `mean` to a class: the shift and the weight of the co-moment's correction.

    C = C_a + C_b + (n_a n_b / n) shift shift^T with shift = mean_b - mean_a, and mean = mean_a + shift n_b / n.
    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    before = int(counts[label])
    total = before + count
    shift = mean - means[label]
    means[label] += shift * (count / total)
    counts[label] = total
    return shift, before * count / total


def _require_equal(what: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    if mine != theirs:
        raise ValueError(f"cannot merge moments whose {what} is {theirs} into those of {mine}: record both alike")
