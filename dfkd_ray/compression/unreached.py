"""Weights of convolutions that no pixel reaches, where a map is smaller than the kernel: their gradient is zero.

In bfloat16 on CPUs, PyTorch (oneDNN; torch 2.14) does not write that gradient: it is what was in memory before, often
not a number. A 3x3 convolution of stride 2 on a 1x1 map has such weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray.compression.moments import CONVOLUTIONS, Arguments, Geometry


class Reached(TorchFunctionMode):
    """While active, notes which taps of each convolution's kernel some pixel reaches, by the id of its weight."""

    def __init__(self):
        super().__init__()
        self.taps: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            call = Arguments.of(args, kwargs or {})
            dims, own = call.weight.ndim - 2, id(call.weight)
            taps = reached(Geometry.of(func, call), call.input.shape[-dims:], result.shape[-dims:])
            self.taps[own] = self.taps.get(own, torch.zeros_like(taps)) | taps
        return result


def reached(geometry: Geometry, sizes: Sequence[int], out_sizes: Sequence[int]) -> Tensor:
    """Which taps of a kernel some pixel reaches, bool (*kernel).

    `sizes` of the map, and `out_sizes` of the result, along each dimension.
    """
    found = torch.ones(geometry.kernel, dtype=torch.bool)
    dims = zip(geometry.kernel, sizes, out_sizes, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    for dim, (kernel, size, out_size, stride, padding, dilation) in enumerate(dims):
        first = torch.arange(out_size)[:, None] * stride - padding
        pixels = first + torch.arange(kernel)[None] * dilation
        taps = ((pixels >= 0) & (pixels < size)).any(0)
        found &= taps.view([-1 if each == dim else 1 for each in range(len(geometry.kernel))])
    return found


@contextmanager
def zero_gradients(network: nn.Module, images: Tensor) -> Iterator[None]:
    """While open, the gradients of weights that no pixel of such images reaches are zero.

    `images`: normalised, one is enough. The network runs on it once, and ends in eval mode.
    """
    network.eval()
    with torch.no_grad(), Reached() as seen:
        network(images)
    hooks = []
    for weight in network.parameters():
        taps = seen.taps.get(id(weight))
        if taps is not None and not taps.all() and weight.requires_grad:
            untouched = ~taps.to(weight.device)
            hooks.append(weight.register_hook(lambda gradient, untouched=untouched: gradient.masked_fill(untouched, 0)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
