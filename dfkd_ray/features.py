"""What a network computes on the way to its logits, seen from outside while it runs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Maps = dict[tuple[int, ...], Tensor]  # height and width (or length) → feature map


def last_linear(network: nn.Module) -> nn.Linear | None:
    """The last Linear layer of a network, in the order of its modules; None if it has none."""
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


@contextmanager
def last_linear_inputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list; while open, each forward pass of `network` stores the input of its last Linear layer there."""
    layer, seen = last_linear(network), list[Tensor]()
    assert layer is not None
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(1)))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def last_maps(network: nn.Module) -> Iterator[Maps]:
    """Yields a dict; while open, a forward pass of `network` stores the last feature map of each height and width."""
    seen: Maps = {}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3 and math.prod(output.shape[2:]) > 1:
            seen[tuple(output.shape[2:])] = output

    handles = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
