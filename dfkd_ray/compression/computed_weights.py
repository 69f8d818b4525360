"""Layers that compute with another tensor than their weight, where zeros of the weight would be none.

A convolution with weight standardisation subtracts the mean of its weights in `forward`. What comes out is not zero
where the weight is. (Parametrizations are found without a pass, by `pruning.prunable`.)
"""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray.compression import pruning
from dfkd_ray.compression.moments import LAYERS, Arguments

KEPT_EVERY = 8  # in the comparison one weight in so many is not zero
MOST_NOT_ZERO = 0.5  # of what a layer computes with, where its weight has 1 / KEPT_EVERY


class Calls(TorchFunctionMode):
    """While active, notes the smallest share that is not zero of the weights that each layer's `forward` uses."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.inside: list[str] = []
        self.shares: dict[str, float] = {}
        for name, module in network.named_modules():
            if isinstance(module, pruning.KINDS):
                module.register_forward_pre_hook(partial(self.enter, name))
                module.register_forward_hook(self.leave)

    def enter(self, name: str, *_: Any) -> None:
        """A layer begins."""
        self.inside.append(name)

    def leave(self, *_: Any) -> None:
        """The layer that began last ends."""
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LAYERS and self.inside:
            weight = Arguments.of(args, kwargs or {}).weight
            name, share = self.inside[-1], weight.count_nonzero().item() / max(1, weight.numel())
            self.shares[name] = min(share, self.shares.get(name, 1.0))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def refuse(network: nn.Module, image: Tensor) -> None:
    """`ValueError` if zeros in the weight of a layer are no zeros in what it computes with.

    `image`: one, normalised (1, channels, height, width), on the network's device. The network is not changed.
    """
    copy = deepcopy(network).eval()
    for weight in pruning.prunable(copy).values():
        kept = torch.arange(weight.numel(), device=weight.device) % KEPT_EVERY == 0
        weight.mul_(kept.view(weight.shape))
    with Calls(copy) as calls:
        copy(image)
    computed = [name for name, share in calls.shares.items() if share > MOST_NOT_ZERO]
    if computed:
        more = f" and {len(computed) - 1} more" if len(computed) > 1 else ""
        raise ValueError(
            f"layer {computed[0]}{more} computes its weight in forward from the one that it has (as weight "
            "standardisation does): a pruned one would not stay zero; put what it computes into a plain layer"
        )
