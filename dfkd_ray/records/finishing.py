"""The records of a plan whose totals are known: the last step after `fitting`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import dfkd_ray
from dfkd_ray.bundles import Teacher
from dfkd_ray.records import format, gaussian, sizes, spectral, taps
from dfkd_ray.records.fitting import Plan, Totals
from dfkd_ray.records.format import SPECTRAL, BasisInfo, PartInfo, Record, RecordInfo
from dfkd_ray.records.moments import Moments, Sketch

LEAKS = {
    "gaussian": "means and covariances over the training examples of each class; no single example",
    "exemplars": "compressed activations of single training examples, from which each can be partly reconstructed",
}


def finish(plan: Plan, totals: Totals, teacher: Teacher, notes: Mapping[str, Any] | None = None) -> list[Record]:
    """The records of all kinds."""
    notes = {"package_version": dfkd_ray.__version__, "seed": plan.seed, "rank": plan.rank} | dict(notes or {})
    records = []
    for kind in plan.kinds:
        make = finish_spectral if kind in SPECTRAL else finish_layers
        records.append(make(plan, totals, kind, teacher.hash, notes))
    return records


def header(plan: Plan, kind: str, teacher_hash: str, counts: Tensor, notes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all records have."""
    return {
        "kind": kind,
        "storage": plan.storage,
        "teacher_hash": teacher_hash,
        "num_classes": plan.num_classes,
        "num_examples": tuple(int(count) for count in counts),
        "temperature": plan.temperature,
        "layers": format.layer_infos(plan.taps),
        "leaks": LEAKS[plan.storage],
        "notes": dict(notes),
    }


def finish_layers(plan: Plan, totals: Totals, kind: str, teacher_hash: str, notes: Mapping[str, Any]) -> Record:
    """A record with a Gaussian per layer and class."""
    own = {tap.name: totals.statistics[f"{kind}/{tap.name}"] for tap in plan.taps_of(kind)}
    parts, tensors, explained = gaussian_parts(own, plan.max_bytes - sizes.HEADER)
    counts = own[plan.taps[-1].name].counts  # the same in every layer
    info = RecordInfo(**header(plan, kind, teacher_hash, counts, {**notes, **explained}), parts=parts)
    return Record(info, tensors)


def gaussian_parts(
    statistics: Mapping[str, Moments | Sketch], max_bytes: int
) -> tuple[tuple[PartInfo, ...], dict[str, Tensor], dict[str, Any]]:
    """Means and factors of all parts in at most `max_bytes`, and notes on the factors that were cut.

    A singular covariance is shrunk; the part's header has the amount.
    """
    factors: dict[str, Tensor] = {}
    shrinkage: dict[str, tuple[float, ...]] = {}
    for name, own in statistics.items():
        if isinstance(own, Moments):
            found = [gaussian.cholesky(covariance) for covariance in own.covariance()]
            factors[name] = torch.stack([factor for factor, _ in found])
            shrinkage[name] = tuple(amount for _, amount in found)
        else:
            factors[name] = own.factor()
    mean_bytes = sum(4 * own.means.numel() for own in statistics.values())
    kept, explained = sizes.cut(factors, max_bytes - mean_bytes)
    parts, tensors = [], {}
    for name, own in statistics.items():
        dense = isinstance(own, Moments) and name not in explained
        units, rank = kept[name].shape[1:]
        kind = "dense" if dense else "low_rank"
        parts.append(PartInfo(name=name, units=units, statistics=kind, rank=rank, shrinkage=shrinkage.get(name, ())))
        tensors |= {f"{name}.mean": own.means.float(), f"{name}.factor": kept[name]}
    return tuple(parts), tensors, {"explained_variance": explained} if explained else {}


def finish_spectral(plan: Plan, totals: Totals, kind: str, teacher_hash: str, notes: Mapping[str, Any]) -> Record:
    """A spectral record: a joint Gaussian per class of the strongest coefficients, or the exemplars' coefficients."""
    statistics, bases = totals.statistics[kind], plan.bases[kind]
    assert isinstance(statistics, Moments)
    num_kept = plan.num_kept(kind)
    names = taps.signal_names(kind, plan.taps)
    if plan.storage == "exemplars":
        kept = sorted(totals.exemplars[kind])
        rows = torch.stack([found for _, _, found in kept])
        indices = rows.abs().topk(num_kept, dim=1).indices.sort(dim=1).values
        tensors = {
            "labels": torch.tensor([label for _, label, _ in kept]),
            "indices": indices.int(),
            "values": rows.gather(1, indices).half(),
        }
        parts, explained = (), {}
    else:
        covariance, means = statistics.covariance(), statistics.means
        weights = statistics.counts.double() / statistics.counts.sum()
        energy = (weights[:, None] * (means.square() + covariance.diagonal(dim1=1, dim2=2))).sum(dim=0)
        column_bytes = torch.cat([torch.full((basis.shape[1],), 2 * basis.shape[0]) for basis in bases])
        order = energy.argsort(descending=True, stable=True)[:num_kept]
        num_kept = sizes.num_coefficients(column_bytes[order], plan.num_classes, plan.max_bytes - sizes.HEADER)
        indices = spectral.strongest(energy, num_kept)
        bases = split_columns(bases, indices)
        chosen = Moments(statistics.counts, means[:, indices], statistics.comoments[:, indices][:, :, indices])
        left = plan.max_bytes - sizes.HEADER - int(column_bytes[indices].sum())
        parts, tensors, explained = gaussian_parts({"coefficients": chosen}, left)
    tensors |= {f"basis.{i}": basis.half() for i, basis in enumerate(bases)}
    infos = tuple(
        BasisInfo(signal=name, units=basis.shape[0], columns=basis.shape[1])
        for name, basis in zip(names, bases, strict=True)
    )
    common = header(plan, kind, teacher_hash, statistics.counts, {**notes, **explained})
    return Record(RecordInfo(**common, share=plan.share, parts=parts, bases=infos), tensors)


def split_columns(bases: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, ...]:
    """The columns with these (sorted) indices, counted through all bases, split again by basis."""
    kept, start = [], 0
    for basis in bases:
        own = indices[(indices >= start) & (indices < start + basis.shape[1])] - start
        kept.append(basis[:, own])
        start += basis.shape[1]
    return tuple(kept)
