"""Scores of channels for structured pruning: from weights, from BatchNorm, or from synthetic images.

A score is of a unit, the channels that are removed at once, over all layers that make or read them. Adding one is a
function and a line in `SCORES`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from dfkd_ray import batchnorm
from dfkd_ray.compression import pruning
from dfkd_ray.compression.dependencies import Axis, Group
from dfkd_ray.compression.moments import LAYERS, Arguments

Images = Tensor | None


def squared_norms(module: Any, dimension: str) -> Tensor:
    """The squared norms of a layer's weights for each channel of a dimension: (channels,), float64."""
    squares = module.weight.detach().double().cpu().square()
    transposed = isinstance(module, _ConvTransposeNd)
    if not isinstance(module, pruning.KINDS) or (dimension == "in") == transposed or squares.shape[1] == 1:
        return squares.flatten(1).sum(1) if squares.ndim > 1 else squares
    groups = getattr(module, "groups", 1)  # each has its own part of the second dimension
    split = squares.view(groups, len(squares) // groups, squares.shape[1], -1)
    return split.sum((1, 3)).flatten()


def summed(group: Group, values: dict[Axis, Tensor]) -> tuple[Tensor, int]:
    """The sum over axes with values of what a unit's channels have: (units,); and the number of these axes."""
    of = {axis: values[axis].tolist() for axis in group.axes if axis in values}
    totals = [sum(of[axis][channel] for axis, channel in unit if axis in of) for unit in group.units]
    return torch.tensor(totals, dtype=torch.float64), len(of)


def relative(total: Tensor) -> Tensor:
    """Scores over their mean in the group."""
    return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)


def magnitude(network: nn.Module, groups: Sequence[Group], images: Images) -> list[Tensor]:
    """Mean over layers of the squared norm of a channel's weights, made and read, over the group's mean.

    Source: Fang et al. 2023, arXiv 2301.12900, section 3.3 (group magnitude).
    """
    modules = dict(network.named_modules())
    norms: dict[Axis, Tensor] = {}
    for path, dimension in dict.fromkeys(axis for group in groups for axis in group.axes):
        if not isinstance(modules[path], nn.PReLU) and modules[path].weight is not None:
            norms[path, dimension] = squared_norms(modules[path], dimension)
    sums = [summed(group, norms) for group in groups]
    return [relative(total / max(1, num)) for total, num in sums]


def batchnorm_scale(network: nn.Module, groups: Sequence[Group], images: Images) -> list[Tensor]:
    """Mean |γ| over the BatchNorm layers of a channel, over the group's mean.

    Source: Liu et al. 2017, arXiv 1708.06519 (network slimming), here over all layers that share the channel.
    """
    modules = dict(network.named_modules())
    scales: dict[Axis, Tensor] = {}
    for axis in dict.fromkeys(axis for group in groups for axis in group.axes):
        module = modules[axis[0]]
        if isinstance(module, BatchNorm):
            ones = torch.ones(module.num_features)
            scales[axis] = (ones if module.weight is None else module.weight.detach().abs()).double().cpu()
    return [relative(summed(group, scales)[0]) for group in groups]


class Variances(TorchFunctionMode):
    """While active, records the variance of each input channel of Conv and Linear layers at their first call."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.paths = {id(weight): name.rpartition(".")[0] for name, weight in pruning.prunable(network).items()}
        self.found: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in LAYERS:
            call = Arguments.of(args, given)
            path = self.paths.get(id(call.weight))
            if path is not None and path not in self.found:
                x = call.input.flatten(0, -2) if func is F.linear else call.input
                self.found[path] = batchnorm.channel_moments(x.float())[1].double().cpu()
        return func(*args, **given)


@torch.no_grad()
def activations(network: nn.Module, groups: Sequence[Group], images: Images) -> list[Tensor]:
    """What a channel's changes add to the outputs of the layers that read it, over what all of their channels add.

    Σ over readers of var(x_c) ‖W_c‖² / Σ_j var(x_j) ‖W_j‖². Source: An et al. 2023, arXiv 2312.11983 (FLAP), equation
    5: the variance, because what is constant is compensated for.
    """
    assert images is not None, "this score needs images"
    network.eval()
    with Variances(network) as seen:
        network(images)
    modules = dict(network.named_modules())
    shares: dict[Axis, Tensor] = {}
    for axis in dict.fromkeys(axis for group in groups for axis in group.axes):
        if axis[1] == "in" and axis[0] in seen.found:
            power = seen.found[axis[0]] * squared_norms(modules[axis[0]], "in")
            shares[axis] = power / power.sum().clamp_min(torch.finfo(power.dtype).tiny)
    return [summed(group, shares)[0] for group in groups]


SCORES: dict[str, Callable[[nn.Module, Sequence[Group], Images], list[Tensor]]] = {
    "magnitude": magnitude,
    "batchnorm_scale": batchnorm_scale,
    "activations": activations,
}
