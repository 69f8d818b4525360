"""Counts the multiplications of a network: those of its convolution and linear layers, which are nearly all."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray.compression import pruning
from dfkd_ray.compression.moments import LAYERS, TRANSPOSED, Arguments


class Count(TorchFunctionMode):
    """While active, counts multiply-accumulate operations (MACs) by the name of the layer's weight."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.names = {id(weight): name for name, weight in pruning.prunable(network).items()}
        self.macs: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func in LAYERS:
            call = Arguments.of(args, given)
            # Each output adds up a row of the weight; each input of a transposed convolution is spread over one.
            places = call.input.numel() if func in TRANSPOSED else result.numel()
            row = call.weight.shape[-1] if func is F.linear else call.weight[0].numel()
            self.macs[self.names.get(id(call.weight), "")] += places * row
        return result


@torch.no_grad()
def macs(network: nn.Module, image: Tensor) -> Counter[str]:
    """MACs of one normalised image (1, channels, height, width) in each Conv and Linear layer, by its weight's name.

    Layers that PyTorch runs inside one function (`F.multi_head_attention_forward`) and products of activations
    (attention) are not counted. The network runs in eval mode.
    """
    network.eval()
    with Count(network) as count:
        network(image)
    return count.macs


def num_macs(network: nn.Module, image_shape: Sequence[int]) -> int:
    """All MACs of an image (channels, height, width), of a network on the CPU: see `macs`."""
    return sum(macs(network, torch.zeros(1, *image_shape)).values())
