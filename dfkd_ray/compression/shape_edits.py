"""Replays on a network which channels of which layers were kept, so that a smaller network can be stored as plain data.

The slices of one edit: convolutions (grouped, depthwise, transposed) and linear layers have the dimensions "out" and
"in"; BatchNorm, GroupNorm, LayerNorm over one dimension and PReLU have "out", their channels. A depthwise convolution
has "out" alone, which are its inputs too. Attributes (`in_channels`, `groups`, `num_features`, …) are set to the new
sizes.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dfkd_ray.compression.pruning import KINDS
from dfkd_ray.description import ShapeEdit
from dfkd_ray.text import one_line

GROUPED = "dfkd_ray_grouped"  # attribute of a sliced convolution whose architecture is not depthwise


@dataclass(frozen=True)
class Dimension:
    """One dimension of a layer: its size, the number of groups that keep equally many, and what slices it."""

    size: int
    slice: Callable[[Tensor], None]
    groups: int = 1


def replay(network: nn.Module, edits: Sequence[ShapeEdit]) -> nn.Module:
    """Keep only the channels that the edits name, in place; returns the network.

    `ValueError` with the layer's name for an edit that does not fit it.
    """
    modules = dict(network.named_modules())
    repeated = [key for key, num in Counter((edit.module, edit.dimension) for edit in edits).items() if num > 1]
    if repeated:
        raise ValueError(f"shape_edits: {one_line(repeated[0][0], 80)} has two edits of {repeated[0][1]}")
    for edit in edits:
        where = f"shape_edits: {one_line(edit.module, 80)}"
        module = modules.get(edit.module)
        if module is None:
            raise ValueError(f"{where} is no layer of this network")
        dimension = dimensions(module).get(edit.dimension)
        if dimension is None:
            raise ValueError(f"{where}, a {type(module).__name__}, has no dimension {edit.dimension} to slice")
        if edit.kept[-1] >= dimension.size:
            raise ValueError(f"{where}: channel {edit.kept[-1]} of {edit.dimension}, which has {dimension.size:,}")
        kept = torch.tensor(edit.kept)
        counts = torch.bincount(kept // (dimension.size // dimension.groups), minlength=dimension.groups)
        if counts.min() != counts.max():
            raise ValueError(f"{where}: its {dimension.groups} groups must keep equally many channels")
        dimension.slice(kept)
    return network


def dimensions(module: nn.Module) -> Mapping[str, Dimension]:
    """The dimensions of a layer by name; none for layers of other kinds, or with computed weights."""
    if isinstance(module, KINDS) and module._parameters.get("weight") is None:
        return {}
    if isinstance(module, _ConvNd):
        return of_convolution(module)
    if isinstance(module, nn.Linear):
        return {
            "out": Dimension(module.out_features, lambda kept: set_rows(module, kept, "out_features")),
            "in": Dimension(module.in_features, lambda kept: set_columns(module, kept)),
        }
    if isinstance(module, BatchNorm):
        return {"out": Dimension(module.num_features, lambda kept: set_rows(module, kept, "num_features"))}
    if isinstance(module, nn.GroupNorm):
        return {
            "out": Dimension(
                module.num_channels, lambda kept: set_rows(module, kept, "num_channels"), module.num_groups
            )
        }
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return {"out": Dimension(module.normalized_shape[0], lambda kept: set_rows(module, kept, "normalized_shape"))}
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return {"out": Dimension(module.num_parameters, lambda kept: set_rows(module, kept, "num_parameters"))}
    return {}


def is_depthwise(module: _ConvNd) -> bool:
    """Whether each channel of a convolution is made from the same one of its input.

    Not one that slices have made so: its architecture has more channels in each group, and edits count those.
    """
    is_own = not getattr(module, GROUPED, False)
    return is_own and module.groups == module.in_channels == module.out_channels > 1


def of_convolution(module: _ConvNd) -> Mapping[str, Dimension]:
    """The dimensions of a convolution. Weights are (out, in / groups, …); transposed ones (in, out / groups, …)."""
    transposed = isinstance(module, _ConvTransposeNd)
    if is_depthwise(module):

        def depthwise(kept: Tensor) -> None:
            set_rows(module, kept, "out_channels")
            module.in_channels = module.groups = len(kept)

        return {"out": Dimension(module.out_channels, depthwise)}

    def out(kept: Tensor) -> None:
        keep(module, "weight", kept, 1 if transposed else 0, module.groups if transposed else 1)
        keep(module, "bias", kept)
        module.out_channels = len(kept)
        setattr(module, GROUPED, True)

    def into(kept: Tensor) -> None:
        keep(module, "weight", kept, 0 if transposed else 1, 1 if transposed else module.groups)
        module.in_channels = len(kept)
        setattr(module, GROUPED, True)

    made = {"out": Dimension(module.out_channels, out, module.groups)}
    # A layer with a group for each input channel would lose the group, and with it outputs.
    return (
        made
        if module.groups == module.in_channels > 1
        else {**made, "in": Dimension(module.in_channels, into, module.groups)}
    )


def set_rows(module: Any, kept: Tensor, size: str) -> None:
    """Slice the first dimension of all of a layer's tensors, and set the attribute of its size."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        keep(module, name, kept)
    setattr(module, size, (len(kept),) if size == "normalized_shape" else len(kept))


def set_columns(module: nn.Linear, kept: Tensor) -> None:
    """Slice the inputs of a linear layer."""
    keep(module, "weight", kept, 1)
    module.in_features = len(kept)


def keep(module: nn.Module, name: str, kept: Tensor, dim: int = 0, groups: int = 1) -> None:
    """Slice a parameter or buffer of a layer, if it has it. With groups, `kept` counts over all groups of dimension 0,
    each of which has its own part of dimension `dim`.
    """
    old = getattr(module, name, None)
    if old is None:
        return
    kept = kept.to(old.device)
    with torch.no_grad():
        if groups == 1:
            new = old.detach().index_select(dim, kept)
        else:
            own = kept.view(groups, -1) - old.shape[dim] * torch.arange(groups, device=old.device)[:, None]
            parts = [part.index_select(dim, mine) for part, mine in zip(old.detach().chunk(groups), own, strict=True)]
            new = torch.cat(parts)
        new = new.contiguous()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)


def composed(first: Sequence[ShapeEdit], second: Sequence[ShapeEdit]) -> tuple[ShapeEdit, ...]:
    """One list of edits in the place of two: `second` was made on the network that `first` leaves."""
    before = {(edit.module, edit.dimension): edit for edit in first}
    for edit in second:
        old = before.get((edit.module, edit.dimension))
        kept = edit.kept if old is None else tuple(old.kept[index] for index in edit.kept)
        before[edit.module, edit.dimension] = edit.model_copy(update={"kept": kept})
    return tuple(before.values())
