"""Consistency checks of an activation record: counts, parts, bases, layers and exemplars must fit together.

A record of unknown origin may contain anything. Errors are found when it is read, not later as an index error or as
meaningless images. Each function returns the first problem, or None.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfkd_ray.records import taps
from dfkd_ray.records.header import RecordInfo
from dfkd_ray.text import one_line

LARGEST_COUNT = 2**53
TEMPERATURES = (1e-6, 1e6)
DTYPES = {
    "mean": (torch.float32,),
    "factor": (torch.float16, torch.float32),
    "basis": (torch.float16, torch.float32),
    "labels": (torch.int64,),
    "indices": (torch.int32, torch.int64),
    "values": (torch.float16, torch.float32),
}


def problem_of_header(info: RecordInfo) -> str | None:
    """Contradictions within a header."""
    if len(info.num_examples) != info.num_classes:
        return f"num_examples has {len(info.num_examples)} counts for {info.num_classes} classes"
    if not all(1 <= count <= LARGEST_COUNT for count in info.num_examples):
        return "num_examples must be at least 1 in every class"
    if not TEMPERATURES[0] <= info.temperature <= TEMPERATURES[1]:
        return f"temperature is {info.temperature:g}, expected {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}"
    if not info.layers or math.prod(info.layers[-1].out_shape) != info.num_classes:
        return f"its last layer does not give {info.num_classes} logits"
    names = [layer.name for layer in info.layers]
    if len(set(names)) < len(names):
        return "a layer is named twice"
    for part in info.parts:
        if part.rank != part.units if part.statistics == "dense" else part.rank > part.units:
            return f"part {one_line(part.name, 60)} has rank {part.rank} for {part.units} units ({part.statistics})"
        if len(part.shrinkage) not in (0, info.num_classes) or not all(0 <= amount <= 1 for amount in part.shrinkage):
            return f"part {one_line(part.name, 60)} has an invalid shrinkage: expected one value per class, from 0 to 1"
    return problem_of_bases(info) if info.kind in ("spectral", "spectral_pairs") else problem_of_layers(info)


def problem_of_layers(info: RecordInfo) -> str | None:
    """Wrong parts of a `top` or `all` record: `top` has the last layer's part, `all` one per layer, in order."""
    if info.storage != "gaussian" or info.bases or info.share is not None:
        return f"a {info.kind} record has no exemplars, bases or share"
    wanted = info.layers if info.kind == "all" else info.layers[-1:]
    expected = [(layer.name, math.prod(layer.out_shape)) for layer in wanted]
    found = [(part.name, part.units) for part in info.parts]
    if found == expected:
        return None
    return f"its parts are {one_line(found, 80)}, the layers of a {info.kind} record {one_line(expected, 80)}"


def problem_of_bases(info: RecordInfo) -> str | None:
    """Wrong bases of a spectral record: it needs one per signal, and a part with as many units as bases' columns."""
    if info.share is None:
        return "a spectral record must say its share"
    units = [(math.prod(layer.in_shape), math.prod(layer.out_shape)) for layer in info.layers]
    if info.kind == "spectral":
        sizes = [sum(out for _, out in units)]
    else:
        sizes = [units[0][1], *(side for pair in units[1:] for side in pair)]
    found_taps = [taps.Tap(layer.name, layer.in_shape, layer.out_shape) for layer in info.layers]
    expected = list(zip(taps.signal_names(info.kind, found_taps), sizes, strict=True))
    found = [(basis.signal, basis.units) for basis in info.bases]
    if found != expected:
        return f"its bases are {one_line(found, 80)}, the signals of the layers {one_line(expected, 80)}"
    wide = next((basis for basis in info.bases if basis.columns > basis.units), None)
    if wide:
        return f"basis {one_line(wide.signal, 60)} has {wide.columns} columns for {wide.units} units"
    columns = sum(basis.columns for basis in info.bases)
    if columns < 1:
        return "its bases have no column"
    parts = [] if info.storage == "exemplars" else [("coefficients", columns)]
    if [(part.name, part.units) for part in info.parts] != parts:
        given = [(part.name, part.units) for part in info.parts]
        return f"its parts are {one_line(given, 80)}, expected {parts} of {columns} columns of its bases"
    return None


def problem_of_tensors(info: RecordInfo, tensors: Mapping[str, Tensor]) -> str | None:
    """Wrong dtypes or values of tensors; their shapes have been checked before."""
    for name, tensor in tensors.items():
        first, last = name.partition(".")[0], name.rpartition(".")[2]
        wanted = DTYPES["basis" if first == "basis" and last.isdigit() else last]
        if tensor.dtype not in wanted:
            return f"{one_line(name, 60)} holds {tensor.dtype}, expected {' or '.join(map(str, wanted))}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{one_line(name, 60)} has values that are not finite"
    return problem_of_exemplars(info, tensors) if info.storage == "exemplars" else None


def problem_of_exemplars(info: RecordInfo, tensors: Mapping[str, Tensor]) -> str | None:
    """Wrong exemplars: labels must be classes, and the indices of a row distinct columns of the bases."""
    labels, indices = tensors["labels"], tensors["indices"]
    columns = sum(basis.columns for basis in info.bases)
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < info.num_classes:
        return f"labels must be classes from 0 to {info.num_classes - 1}"
    counts = torch.bincount(labels, minlength=info.num_classes).tolist()
    if any(not 1 <= count <= most for count, most in zip(counts, info.num_examples, strict=True)):
        return "labels must have every class, and none more often than num_examples says"
    if indices.shape[1] == 0 or not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        return f"indices must be columns of the bases from 0 to {columns - 1}"
    ordered = indices.sort(dim=1).values
    return "indices name a column twice" if bool((ordered[:, 1:] == ordered[:, :-1]).any()) else None
