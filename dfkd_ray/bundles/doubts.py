"""What looks wrong in a teacher, found without data: a sentence each, for the commands that load or import one.

A doubt refuses nothing. It says what cannot be, or can hardly be, if the description fits the network.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm
from dfkd_ray.bundles import Teacher
from dfkd_ray.heads import HEADS

NUM_IMAGES = 16  # of noise
SURE = 0.9999  # mean probability of the answers on noise, from which a teacher is said to be sure of anything
SLACK = 1.01  # of a bound, for rounding
EQUAL = 1e-3  # relative difference of sums, for rounding
# Subclasses may compute with other weights, or pad otherwise.
PLAIN = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


@torch.no_grad()
def doubts(teacher: Teacher) -> list[str]:
    """The doubts about a teacher, most serious first."""
    network, info = teacher.network, teacher.info
    found = []
    low, high = info.space.bounds()
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(NUM_IMAGES, *info.image_shape, generator=generator)
    noise = low[0] + share * (high - low)[0]
    first = FirstNormalisation(network)
    logits = first.run(noise)
    if not logits.isfinite().all():
        found.append("its outputs on noise within the pixel range are not finite")
    else:
        confidence = float(HEADS[info.head].confidence(logits))
        if info.trained and confidence >= SURE:
            found.append(
                f"it is sure of noise (mean probability of its answers {confidence:.4f}): mean, std or pixel_range may "
                "not be those that it was trained with"
            )
        sums = logits.sum(dim=1)
        are_shares = bool((sums / sums.mean() - 1).abs().max() < EQUAL)  # as 100 times a softmax
        if info.trained and float(logits.min()) >= 0 and (float(logits.max()) <= 1 or are_shares):
            what = "have the same sum for each image" if are_shares else "lie between 0 and 1"
            found.append(
                f"all its outputs on noise {what}, and are taken as logits: if they are probabilities, let it return "
                "the logits"
            )
    if info.trained:
        found += [*statistics_doubts(network), *first.doubts(low, high)]
    return found


def statistics_doubts(network: nn.Module) -> Iterator[str]:
    """Doubts about the running statistics themselves."""
    layers = batchnorm.layers(network)
    initial = [layer for layer in layers if batchnorm.is_initial(layer)]
    if layers and len(initial) == len(layers):
        yield (
            "all its BatchNorm statistics are the initial ones (mean 0, variance 1): the weights file may have come "
            "without them, and images made from them mean nothing"
        )
    elif initial:
        yield (
            f"{len(initial)} of its {len(layers)} BatchNorm layers have their initial statistics (mean 0, variance 1): "
            "they may not have been trained"
        )


class FirstNormalisation:
    """The first convolution or linear layer of a forward pass and a BatchNorm layer that is fed by it directly."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.linear: Any = None
        self.output: Tensor | None = None
        self.sees_images = False
        self.layer: batchnorm.BatchNorm | None = None

    def run(self, images: Tensor) -> Tensor:
        """The logits of images; finds the two layers."""
        self.images = images
        handles = []
        for module in self.network.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                handles.append(module.register_forward_hook(self._linear))
            elif isinstance(module, batchnorm.BatchNorm):
                handles.append(module.register_forward_pre_hook(self._normalisation))
        try:
            return self.network(images).float()
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if self.linear is None and self.output is None:
            self.linear, self.output = module, output
            self.sees_images = bool(given) and torch.equal(given[0].flatten().float(), self.images.flatten())

    def _normalisation(self, layer: nn.Module, given: tuple[Any, ...]) -> None:
        if self.layer is None and self.output is not None and given and given[0] is self.output:
            assert isinstance(layer, batchnorm.BatchNorm)
            self.layer = layer

    def doubts(self, low: Tensor, high: Tensor) -> Iterator[str]:
        """Doubts about what the layer has recorded: no images of this range give such a mean or variance.

        A linear function of pixels lies between two bounds; the variance of what lies between is at most a quarter of
        their squared distance (Popoviciu's inequality). Zero padding widens the bounds.
        """
        layer, module = self.layer, self.linear
        if layer is None or layer.running_mean is None or layer.running_var is None or batchnorm.is_initial(layer):
            return
        weight = module.weight.double()
        if type(module).forward not in PLAIN or not self.sees_images:
            return
        if getattr(module, "groups", 1) != 1 or weight.shape[1] != low.shape[1]:
            return
        padded = any(module.padding) if isinstance(module.padding, tuple) else module.padding != "valid"
        ends = [low.double().flatten(), high.double().flatten()]
        if padded and module.padding_mode == "zeros":
            ends = [ends[0].clamp_max(0), ends[1].clamp_min(0)]
        by_channel = [part.flatten(2).sum(2) for part in (weight.clamp_min(0), weight.clamp_max(0))]
        bias = 0 if module.bias is None else module.bias.double()
        least = by_channel[0] @ ends[0] + by_channel[1] @ ends[1] + bias
        most = by_channel[0] @ ends[1] + by_channel[1] @ ends[0] + bias
        mean, variance = layer.running_mean.double(), layer.running_var.double()
        spread = (most - least) * SLACK + 1e-6
        outside = (mean < most - spread) | (mean > least + spread) | (variance > spread.square() / 4)
        if bool(outside.any()):
            yield (
                f"its first BatchNorm layer has recorded values that no image of this mean, std and pixel_range gives, "
                f"in {int(outside.sum())} of {len(outside)} channels: they are not those that it was trained with"
            )
