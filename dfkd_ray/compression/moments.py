"""Second moments of a layer's input patches and outputs: of linear layers and of convolutions of every kind.

A layer is seen at its functional call (`F.conv2d(input, weight, …)`), where padding modes, subclasses and functional
use have already become plain arguments.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_ray.batches import mix_seed

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
LAYERS = {*CONVOLUTIONS, *TRANSPOSED, F.linear}
POSITIONS = 8  # sampled output positions per input of a row …
LEAST_POSITIONS = 16_384  # … and at least so many, if there are
LARGEST = 192 << 20  # bytes of a layer's covariances: 5,016 inputs, more than ResNet-18 has in any layer
PART = 4096  # positions whose patches exist at once


@dataclass(frozen=True)
class Arguments:
    """The arguments of a layer's functional call; `rest` and `named` are those after input, weight and bias."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: Sequence[Any]
    named: Mapping[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], given: Mapping[str, Any]) -> "Arguments":
        """From the positional and named arguments of the call."""
        names = ("input", "weight", "bias")
        own = {**dict(zip(names, args, strict=False)), **{name: given[name] for name in names if name in given}}
        named = {name: value for name, value in given.items() if name not in names}
        return cls(own["input"], own["weight"], own.get("bias"), args[3:], named)


@dataclass(frozen=True)
class Moments:
    """Means, covariances and cross-covariances of a layer's input patches and targets, float64.

    `mean` (groups, inputs), `gram` (groups, inputs, inputs), `cross` (groups, outputs, inputs), `target_mean` (groups,
    outputs).
    """

    mean: Tensor
    gram: Tensor
    cross: Tensor
    target_mean: Tensor

    def uncentred(self) -> "Moments":
        """Second moments about zero: for a layer that cannot add a constant."""
        gram = self.gram + self.mean[:, :, None] * self.mean[:, None]
        cross = self.cross + self.target_mean[:, :, None] * self.mean[:, None]
        return Moments(self.mean, gram, cross, self.target_mean)


def triple(value: Any, dims: int) -> list[int]:
    """One number per dimension."""
    return [int(value)] * dims if isinstance(value, int) else [int(each) for each in (list(value) * dims)[:dims]]


@dataclass(frozen=True)
class Geometry:
    """How a layer's output positions take their inputs."""

    kernel: tuple[int, ...]  # () for a linear layer
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # before the first pixel
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    @classmethod
    def of(cls, func: Any, call: Arguments) -> "Geometry":
        """From a functional call."""
        if func is F.linear:
            return cls(())
        dims = call.weight.ndim - 2
        transposed = func in TRANSPOSED
        order = ("stride", "padding", "output_padding", "groups", "dilation")
        if not transposed:
            order = ("stride", "padding", "dilation", "groups")
        named = {**dict(zip(order, call.rest, strict=False)), **call.named}
        stride, dilation = (triple(named.get(name, 1), dims) for name in ("stride", "dilation"))
        kernel = call.weight.shape[2:]
        padding = named.get("padding", 0)
        if padding == "valid":
            padding = 0
        if padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        return cls(
            tuple(kernel),
            int(named.get("groups", 1)),
            tuple(stride),
            tuple(triple(padding, dims)),
            tuple(dilation),
            transposed,
        )

    def rows(self, weight: Tensor) -> Tensor:
        """A weight (or mask) as (groups, outputs, inputs · kernel positions)."""
        if not self.kernel:
            return weight[None]
        if not self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return split.transpose(1, 2).reshape(self.groups, weight.shape[1], -1)

    def unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`."""
        if not self.transposed:
            return rows.reshape(like.shape)
        split = rows.reshape(self.groups, like.shape[1], like.shape[0] // self.groups, *like.shape[2:])
        return split.transpose(1, 2).reshape(like.shape)

    def num_inputs(self, inputs: Tensor) -> int:
        """Inputs of one row: channels of a group times kernel positions."""
        if not self.kernel:
            return inputs.shape[-1]
        return inputs.shape[1] // self.groups * math.prod(self.kernel)

    def too_large(self, inputs: Tensor) -> bool:
        """Whether the covariances would take over `LARGEST` bytes; several tensors of that size exist at once."""
        return 8 * self.groups * self.num_inputs(inputs) ** 2 > LARGEST

    def moments(self, inputs: Tensor, target: Tensor, seed: int) -> Moments:
        """Moments over sampled output positions: `POSITIONS` per input, at least `LEAST_POSITIONS`, if there are.

        Products of a part are float32, about the first part's means; parts are added in float64.
        """
        most = max(LEAST_POSITIONS, POSITIONS * self.num_inputs(inputs))
        generator = torch.Generator().manual_seed(mix_seed(seed))
        if not self.kernel:
            flat, aims = inputs.reshape(-1, inputs.shape[-1]), target.reshape(-1, target.shape[-1])
            chosen = sample(len(flat), most, generator, inputs.device)
            pairs = ((flat[part][:, None], aims[part][:, None]) for part in chosen.split(PART))
        else:
            chosen = sample(len(target) * target[0, 0].numel(), most, generator, inputs.device)
            pairs = (self.patches(inputs, target, part) for part in chosen.split(PART))
        count, total = 0, None
        x0 = z0 = torch.zeros(())
        for x, z in pairs:
            x, z = x.float(), z.float()
            if total is None:
                x0, z0 = x.mean(0), z.mean(0)
            x, z = (x - x0).transpose(0, 1), (z - z0).transpose(0, 1)  # (groups, n, …)
            parts = [x.sum(1), x.mT @ x, z.mT @ x, z.sum(1)]
            parts = [part.double() for part in parts]
            total = parts if total is None else [old.add_(new) for old, new in zip(total, parts, strict=True)]
            count += x.shape[1]
        assert total is not None
        mean, gram, cross, target_mean = (part / count for part in total)
        gram = gram - mean[:, :, None] * mean[:, None]
        cross = cross - target_mean[:, :, None] * mean[:, None]
        return Moments(mean + x0, gram, cross, target_mean + z0)

    def patches(self, inputs: Tensor, target: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Input patches (n, groups, inputs) and targets (n, groups, outputs) at flat output positions."""
        sizes = target.shape[2:]
        image = chosen // target[0, 0].numel()
        place, rest = [], chosen % target[0, 0].numel()
        for size in reversed(sizes):  # torch.unravel_index would import sympy
            place.insert(0, rest % size)
            rest = rest // size
        aims = target[(image, slice(None), *place)].reshape(len(chosen), self.groups, -1)
        offsets = torch.tensor(
            list(product(*map(range, self.kernel))), device=inputs.device
        )  # (kernel positions, dims)
        index, inside = [], torch.ones(len(chosen), len(offsets), dtype=torch.bool, device=inputs.device)
        for axis, size in enumerate(inputs.shape[2:]):
            step = offsets[:, axis] * self.dilation[axis]
            if self.transposed:
                reached = place[axis][:, None] + self.padding[axis] - step
                at = reached.div(self.stride[axis], rounding_mode="floor")
                inside &= at * self.stride[axis] == reached
            else:
                at = place[axis][:, None] * self.stride[axis] - self.padding[axis] + step
            inside &= (at >= 0) & (at < size)
            index.append(at.clamp(0, size - 1))
        values = inputs[(image[:, None], slice(None), *index)]  # (n, kernel positions, channels)
        values = values * inside[:, :, None]
        return values.transpose(1, 2).reshape(len(chosen), self.groups, -1), aims


def sample(total: int, most: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Up to `most` of `total` positions, ascending."""
    if total <= most:
        return torch.arange(total, device=device)
    # One position of each of `most` equal stretches: every image and place has its share.
    edges = torch.arange(most, dtype=torch.float64) + torch.rand(most, generator=generator, dtype=torch.float64)
    return (edges * (total / most)).long().clamp_max(total - 1).to(device)
