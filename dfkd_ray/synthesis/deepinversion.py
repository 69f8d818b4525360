"""DeepInversion: images by gradient descent on a frozen teacher.

minimise  label_weight · label + bn_weight · bn + tv_weight · tv + l2_weight · l2  over the images of one batch, where
`bn` sums `losses.batchnorm_distance` over the BatchNorm layers. Source: Yin et al. 2020, arXiv 1912.08795, section 3.
Labels are balanced: they cycle over the classes and continue from batch to batch.

By default an image is the sum of a pyramid: parts at halved resolutions, each upsampled bilinearly. This preconditions
Adam, which is slow to form large structures from single pixels. On a Fashion-MNIST ResNet-18 of width 32, batch 256, 60
steps, the BN term fell to 23 (lr 0.1, bn_weight 0.3), and with plain pixels to 89 (bn_weight 1). A sigmoid instead of
clamping gave 30 to 63. `parametrisation=pixel` is the paper's. Source of the pyramid: Olah, Mordvintsev and Schubert
2017, "Feature Visualization", doi 10.23915/distill.00007 (preconditioning).

`bn_weight: auto` is `BN_SIZE` over `batchnorm.size_of_statistics`. The BatchNorm term sums norms over layers, so it is
larger for deep and wide networks, and it has the scale of their activations: at the start it is 76 for a ResNet-8 and
480 for a MobileNetV2. One weight for all is too small for the first or too large for the second. The quotient makes the
weighted terms of different networks about equally large. How `BN_SIZE` was chosen: `sweeps/RESULTS.md`.

The last iterate of the cosine schedule is stored, not the best one. Its terms are measured on the images as stored.
"""

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, losses
from dfkd_ray.batches import BatchSource
from dfkd_ray.bundles import Teacher, freeze
from dfkd_ray.config import DeepInversionConfig
from dfkd_ray.config.fields import AUTO
from dfkd_ray.heads import HEADS
from dfkd_ray.images import PixelSpace
from dfkd_ray.synthesis.optimiser import (
    Aim,
    Made,
    augmented,
    batches,
    bn_term,
    compose,
    looked_at,
    measured,
    pyramid_sizes,
    require_statistics,
    set_learning_rate,
    total,
)

BN_SIZE = 150.0
SMALLEST_SIZE = 1.0  # of statistics: a larger weight would help nobody
log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=DeepInversionConfig)


def source(teacher: Teacher, config: DeepInversionConfig, key: str, device: torch.device) -> BatchSource:
    """Batches of inverted images. `ValueError` for a teacher without BatchNorm statistics.

    The source uses a copy of the teacher's network on `device`; the network itself is not modified.
    """
    devices.check_precision(config.precision, device, config.fast)
    config = pin(teacher, config)
    network = devices.place(freeze(deepcopy(teacher.network)), device, channels_last=config.channels_last)
    batchnorm.require_layers(network)
    run = compiled(network) if config.compile else network
    space, head = teacher.info.space, HEADS[teacher.info.head]

    def make(slower: DeepInversionConfig, labels: Tensor, generator: torch.Generator, _seed: int) -> Made:
        there = labels.to(device)
        parts = initial_parts(slower, teacher.info.image_shape, generator, device)
        images, steps = invert(network, run, slower, space, parts, Aim(there, head), generator)
        return Made(images, steps, lambda stored: measure(network, config, stored, Aim(there, head)))

    return batches(teacher, config, key, device, make)


def check(teacher: Teacher, config: DeepInversionConfig, where: str) -> None:
    """`ValueError` for a teacher whose BatchNorm statistics cannot be matched; `where`: the config's dotted name."""
    others = "records, where it has some, dafl, or noise" if where == "synthesis" else "records, or noise"
    require_statistics(teacher, config, where, f"method={others}")


def pin(teacher: Teacher, config: Config) -> Config:
    """The config with the number that `bn_weight: auto` stands for, to two digits."""
    if config.bn_weight != AUTO:
        return config
    weight = BN_SIZE / max(batchnorm.size_of_statistics(teacher.network), SMALLEST_SIZE)
    return config.model_copy(update={"bn_weight": float(f"{weight:.2g}")})


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The compiled network; without a C++ compiler the network itself, with a log message."""
    if next(network.parameters()).device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        log.warning("compile=true: no C++ compiler found (g++ or clang++); running without torch.compile")
        return network
    return torch.compile(network, dynamic=False)


def initial_parts(
    config: DeepInversionConfig, image_shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """The initial Gaussian noise: N(0, 1) pixels, or one part per resolution, finest first.

    Finer parts start with smaller amplitudes, as in natural images.
    """
    c, h, w = image_shape
    if config.parametrisation == "pixel":
        return [torch.randn(config.batch_size, c, h, w, generator=generator).to(device)]
    parts = []
    for level, size in enumerate(pyramid_sizes(h, w)):
        amplitude = min(0.2 * (level + 1), 0.6)
        parts.append((amplitude * torch.randn(config.batch_size, c, *size, generator=generator)).to(device))
    return parts


def invert(
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    config: DeepInversionConfig,
    space: PixelSpace,
    parts: Sequence[Tensor],
    aim: Aim,
    generator: torch.Generator,
    student: nn.Module | None = None,
) -> tuple[Tensor, int]:
    """Optimise the parts of images; returns the images (normalised, within the pixel range) and the steps taken.

    `student`: a frozen network in eval mode, whose term `losses.decision_adversary` is added; None: without the term.
    `FloatingPointError` when the loss is no longer finite.
    """
    low, high = space.bounds(aim.labels.device)
    variables = [part.clone().requires_grad_(True) for part in parts]
    optimiser = devices.Adam(variables, lr=config.learning_rate)
    best, checks_since_best, steps = math.inf, 0, 0
    with batchnorm.recorded(network) as statistics:
        for step in range(config.num_steps):
            set_learning_rate(optimiser, config, step)
            statistics.clear()
            images = torch.clamp(compose(variables), low, high)
            with devices.autocast(config.precision, images.device):
                seen = augmented(images, config, generator)
                logits = run(devices.laid_out(seen, network, channels_last=config.channels_last)).float()
                answers = None if student is None else student(devices.laid_out(seen, student)).float()
            own = terms(config, images, logits, aim, statistics)
            if answers is not None:
                own["adversarial"] = losses.decision_adversary(answers, logits)
            loss = total(config, own)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if len(variables) == 1:
                with torch.no_grad():
                    variables[0].copy_(torch.clamp(variables[0], low, high))
            steps = step + 1
            value = looked_at(loss, steps, config.num_steps)
            if value is None:
                continue
            best, checks_since_best = (value, 0) if value < best * 0.999 else (best, checks_since_best + 1)
            if config.plateau_patience and checks_since_best >= config.plateau_patience:
                break
    return torch.clamp(compose(variables), low, high).detach(), steps


def terms(
    config: DeepInversionConfig, images: Tensor, logits: Tensor, aim: Aim, statistics: batchnorm.Statistics
) -> dict[str, Tensor]:
    """All unweighted loss terms by name."""
    bn = bn_term(statistics, images.device, config.bn_first_multiplier)
    is_cross_entropy = config.label_loss == "cross_entropy"
    label = aim.head.label_loss(logits, aim.labels) if is_cross_entropy else aim.head.entropy(logits)
    return {"label": label, "bn": bn, "tv": losses.total_variation(images), "l2": losses.mean_square(images)}


@torch.no_grad()
def measure(
    network: nn.Module, config: DeepInversionConfig, images: Tensor, aim: Aim, student: nn.Module | None = None
) -> dict[str, Any]:
    """The terms of the stored images, without jitter; also teacher confidence, label agreement, class histogram."""
    images = devices.laid_out(images, network, channels_last=config.channels_last)
    with batchnorm.recorded(network) as statistics, devices.autocast(config.precision, images.device):
        logits = network(images).float()
        own = terms(config, images, logits, aim, statistics)
        if student is not None:
            own["adversarial"] = losses.decision_adversary(student(images).float(), logits)
    return measured(own, logits, aim)
