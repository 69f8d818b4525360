"""Makes activation records in one pass over labelled images, in any number of shards whose totals are merged.

`plan` fixes everything that needs no image (layers, bases, which examples are exemplars). `fit` computes the totals of
one shard, `Totals.merge` adds shards exactly, and `finishing.finish` makes the records. The caller provides the images.

Memory: a layer with at most `MAX_DENSE` units has a dense covariance per class, a larger one a sketch of at most `rank`
columns. A spectral kind has one covariance per class over the columns of all its bases.

Size: a Gaussian record has at most `max_bytes` (`sizes`). A record that would be larger gets fewer columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import devices
from dfkd_ray.bundles import Teacher
from dfkd_ray.images import PixelSpace, decode
from dfkd_ray.records import format, sizes, spectral, taps
from dfkd_ray.records.format import SPECTRAL, Record
from dfkd_ray.records.moments import OVERSAMPLING, Moments, Sketch
from dfkd_ray.records.operators import layer_operator
from dfkd_ray.records.taps import Tap

MAX_DENSE = 1200  # units: the hidden layers of the paper's HintonNet; a covariance of 11.5 MB per class in float64
SKETCH_BYTES = 2**29  # largest sketch of one layer: AlexNet's first convolution (193,600 units) gets rank 105
CHUNK = 256  # examples in one forward pass, at most
CHUNK_BYTES = 2**27  # largest size of its activations: AlexNet at 224x224 has 2 MB per example
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Shard:
    """A subset of the examples; `read(rows)` returns images, uint8 (n, channels, height, width)."""

    read: Callable[[Tensor], Tensor]
    labels: Tensor
    rows: np.ndarray

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
        """Images, labels and rows, `size` at a time."""
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            chosen = torch.from_numpy(rows)
            yield self.read(chosen).numpy(), self.labels[chosen], rows


def shards(read: Callable[[Tensor], Tensor], labels: Tensor, rows: np.ndarray, num: int) -> list[Shard]:
    """The examples in `num` parts of nearly equal size; none is empty."""
    return [Shard(read, labels, part) for part in np.array_split(rows, min(num, len(rows)))]


@dataclass(frozen=True)
class Plan:
    """The settings, layers and bases of a recording; the same for every shard."""

    kinds: tuple[str, ...]
    storage: str
    taps: tuple[Tap, ...]
    bases: Mapping[str, tuple[Tensor, ...]]  # by spectral kind; float32, rounded to float16 values
    num_classes: int
    space: PixelSpace
    temperature: float
    rank: int
    share: float
    exemplars: frozenset[int]  # rows whose coefficients are kept
    seed: int
    max_bytes: int

    def taps_of(self, kind: str) -> tuple[Tap, ...]:
        """The layers of kind `top` or `all`."""
        return self.taps if kind == "all" else self.taps[-1:]

    @property
    def chunk(self) -> int:
        """Examples in one forward pass."""
        return max(1, min(CHUNK, CHUNK_BYTES // (4 * sum(tap.num_units for tap in self.taps))))

    def sketch_rank(self, num_units: int) -> int | None:
        """Rank of the sketch of a layer; None if it has a dense covariance."""
        if num_units <= MAX_DENSE:
            return None
        fits = SKETCH_BYTES // (8 * (self.num_classes + 1) * num_units) - OVERSAMPLING
        return max(1, min(self.rank, num_units, fits))

    def num_kept(self, kind: str) -> int:
        """Coefficients that a spectral record keeps."""
        num_units, num_columns = (sum(basis.shape[side] for basis in self.bases[kind]) for side in (0, 1))
        return min(max(1, round(self.share * num_units)), num_columns)


@dataclass
class Totals:
    """The totals of a shard: statistics by kind and layer, and the coefficients of exemplars by kind."""

    statistics: dict[str, Moments | Sketch] = field(default_factory=dict)
    exemplars: dict[str, list[tuple[int, int, Tensor]]] = field(default_factory=dict)  # row, label, coefficients

    def merge(self, other: "Totals") -> None:
        """Add the totals of another shard."""
        for name, statistics in other.statistics.items():
            self.statistics[name].merge(statistics)  # type: ignore[arg-type]
        for name, kept in other.exemplars.items():
            self.exemplars.setdefault(name, []).extend(kept)


@dataclass(frozen=True)
class Options:
    """Options of a recording. `storage`: `gaussian` or `exemplars`. `rank`: of sketches and bases.

    `share`: number of kept coefficients per unit. `temperature` divides the logits. `num_exemplars` is per class.
    `max_bytes`: largest file of a Gaussian record.
    """

    storage: str = "gaussian"
    rank: int = 256
    share: float = 0.1
    temperature: float = 8.0
    num_exemplars: int = 100
    seed: int = 0
    max_bytes: int = sizes.MAX_BYTES


DEFAULT = Options()


def plan(
    teacher: Teacher, labels: np.ndarray, rows: np.ndarray, kinds: Sequence[str], options: Options = DEFAULT
) -> Plan:
    """Make the plan, before any image is read. `labels` (n,): of all examples; `rows`: the examples to record.

    `ValueError` for a class without an example, and for a `max_bytes` in which not even the smallest record fits.
    """
    rank, seed = options.rank, options.seed
    if teacher.info.head != "softmax":
        raise ValueError("activation records are per class, and this teacher has independent labels (head sigmoid)")
    if options.storage == "exemplars" and not set(kinds) <= set(SPECTRAL):
        raise ValueError("exemplars are stored as spectral coefficients; choose kinds spectral and spectral_pairs")
    missing = sorted(set(range(teacher.info.num_classes)) - set(np.unique(labels[rows]).tolist()))
    if missing:
        raise ValueError(f"activation records: no example of class {missing[0]}; every class needs at least one")
    found = taps.find(teacher.network, teacher.info.image_shape)
    bases = {
        kind: tuple(b.half().float() for b in make_bases(kind, teacher.network, found, rank, seed))
        for kind in kinds
        if kind in SPECTRAL
    }
    chosen: list[int] = []
    if options.storage == "exemplars":
        order = np.random.default_rng(seed).permutation(rows)
        for label in range(teacher.info.num_classes):
            chosen += order[labels[order] == label][: options.num_exemplars].tolist()
    made = Plan(
        tuple(kinds),
        options.storage,
        tuple(found),
        bases,
        teacher.info.num_classes,
        teacher.info.space,
        options.temperature,
        rank,
        options.share,
        frozenset(chosen),
        seed,
        options.max_bytes,
    )
    for kind in kinds if options.storage == "gaussian" else ():
        least = smallest_bytes(made, kind)
        if least > options.max_bytes:
            raise ValueError(
                f"`max_size` is {options.max_bytes / 1e6:g} MB: the smallest {kind} record of this network has "
                f"{least / 1e6:.2f} MB; give more, or leave this kind out"
            )
    return made


def smallest_bytes(plan: Plan, kind: str) -> int:
    """Bytes of a Gaussian record with one column per factor, or with one coefficient."""
    if kind in SPECTRAL:
        bases = plan.bases[kind]
        return sizes.HEADER + 2 * max(basis.shape[0] for basis in bases) + sizes.part_bytes(plan.num_classes, 1, 1)
    parts = [sizes.part_bytes(plan.num_classes, tap.num_units, 1) for tap in plan.taps_of(kind)]
    return sizes.HEADER + sum(parts)


def largest_bytes(plan: Plan, kind: str) -> int:
    """An upper bound for the bytes of a record if `max_bytes` did not bound it, known before any image is read."""
    if kind not in SPECTRAL:
        units = [tap.num_units for tap in plan.taps_of(kind)]
        parts = [sizes.part_bytes(plan.num_classes, num, plan.sketch_rank(num) or num) for num in units]
        return sizes.HEADER + sum(parts)
    bases, num_kept = plan.bases[kind], plan.num_kept(kind)
    if plan.storage == "exemplars":
        own = sum(2 * basis.numel() for basis in bases) + len(plan.exemplars) * (8 + 6 * num_kept)
        return sizes.HEADER + own
    columns = sorted((basis.shape[0] for basis in bases for _ in range(basis.shape[1])), reverse=True)[:num_kept]
    return sizes.HEADER + 2 * sum(columns) + sizes.part_bytes(plan.num_classes, num_kept, num_kept)


def make_bases(kind: str, network: nn.Module, found: Sequence[Tap], rank: int, seed: int) -> list[Tensor]:
    """Orthonormal bases of the signals of a spectral kind, float32 (units, columns)."""
    modules = dict(network.named_modules())
    operators = [layer_operator(modules[tap.name], tap.in_shape) for tap in found]
    if kind == "spectral":
        basis, _ = spectral.graph_basis(operators[1:], [tap.out_shape for tap in found], 4 * rank, seed)
        return [basis.float()]
    bases = []
    for index, operator in enumerate(operators):
        left, _, right = spectral.pair_basis(operator, rank, seed)
        bases += [left.float()] if index == 0 else [right.float(), left.float()]
    return bases


def empty(plan: Plan) -> Totals:
    """Totals without any example."""
    totals = Totals()

    def statistics(units: int, seed: int) -> Moments | Sketch:
        rank = plan.sketch_rank(units)
        if rank is None:
            return Moments.empty(plan.num_classes, units)
        return Sketch.empty(plan.num_classes, units, rank, seed)

    for kind in plan.kinds:
        if kind in SPECTRAL:
            columns = sum(basis.shape[1] for basis in plan.bases[kind])
            totals.statistics[kind] = Moments.empty(plan.num_classes, columns)
            continue
        for index, tap in enumerate(plan.taps_of(kind)):
            totals.statistics[f"{kind}/{tap.name}"] = statistics(tap.num_units, plan.seed + index)
    return totals


@torch.no_grad()
def fit(
    plan: Plan,
    network: nn.Module,
    shard: "Shard",
    num_threads: int = 1,
    progress: Progress | None = None,
) -> Totals:
    """The totals of a shard. `ValueError` if an activation is not finite."""
    totals, device = empty(plan), next(network.parameters()).device
    bases = {kind: [basis.to(device) for basis in own] for kind, own in plan.bases.items()}
    with devices.numerics("float32", device, num_threads), taps.recorded(network, plan.taps) as values:
        for images, classes, rows in shard.batches(plan.chunk):
            network(decode(images, plan.space, device))
            outputs = taps.scaled_outputs(values, plan.temperature)
            for tap, output in zip(plan.taps, outputs, strict=True):
                if not output.isfinite().all():
                    raise ValueError(
                        f"activation records: layer {tap.name} gives values that are not finite on one of the examples "
                        f"{int(rows[0])} to {int(rows[-1])}; the teacher or the data is broken"
                    )
            for kind in plan.kinds:
                add(plan, totals, kind, values, outputs, bases, classes, rows)
            if progress:
                progress(len(classes))
    return totals


def add(
    plan: Plan,
    totals: Totals,
    kind: str,
    values: taps.Values,
    outputs: Sequence[Tensor],
    bases: Mapping[str, Sequence[Tensor]],
    labels: Tensor,
    rows: np.ndarray,
) -> None:
    """Add one forward pass to one kind."""
    if kind not in SPECTRAL:
        own = plan.taps_of(kind)
        for tap, output in zip(own, outputs[-len(own) :], strict=True):
            totals.statistics[f"{kind}/{tap.name}"].update(output.cpu(), labels)
        return
    found = coefficients(taps.basis_signals(kind, values, plan.temperature), bases[kind]).cpu()
    totals.statistics[kind].update(found, labels)
    for position, row in enumerate(rows.tolist()):
        if row in plan.exemplars:
            kept = totals.exemplars.setdefault(kind, [])
            kept.append((row, int(labels[position]), found[position].clone()))


def coefficients(signals: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    """The graph Fourier transforms of the signals, concatenated: (examples, columns of all bases)."""
    return torch.cat([spectral.coefficients(s, basis) for s, basis in zip(signals, bases, strict=True)], dim=1)


def size_bytes(record: Record) -> int:
    """Bytes of the record's file."""
    return len(format.encode(record))


def dense_bytes(found: Sequence[Tap], num_classes: int) -> int:
    """Bytes of float32 means and full covariances of all layers and classes, for comparison with a record's size."""
    return sum(4 * num_classes * (tap.num_units + tap.num_units**2) for tap in found)
