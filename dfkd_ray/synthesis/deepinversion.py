"""DeepInversion: images by gradient descent on a frozen teacher.

minimise  label_weight · label + bn_weight · bn + tv_weight · tv + l2_weight · l2  over the images of one batch, where
`bn` sums `losses.batchnorm_distance` over the BatchNorm layers. Source: Yin et al. 2020, arXiv 1912.08795, section 3.
Labels are balanced: they cycle over the classes, on through the batches.

The images are a sum of parts at halved resolutions, each upsampled bilinearly (a preconditioner: Adam on pixels is slow
to build anything larger than a pixel). On a Fashion-MNIST ResNet-18 of width 32, batch 256 and 60 steps, the BN term
fell to 23 (lr 0.1, bn_weight 0.3) where pixels reached 89 (bn_weight 1); squashing with a sigmoid instead of clamping
reached 30 to 63. `parametrisation=pixel` is the paper's. Source of the idea: Olah, Mordvintsev and Schubert 2017,
"Feature Visualization", doi 10.23915/distill.00007 (preconditioning).

The best image is not tracked: the last iterate of a cosine schedule is what is stored, and is measured as stored.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, losses
from dfkd_ray.batches import Batch, BatchSource, batch_seed, mix_seed
from dfkd_ray.bundles import Teacher, freeze
from dfkd_ray.config import DeepInversionConfig, RecordsConfig
from dfkd_ray.images import PixelSpace, decode, encode

ATTEMPTS = 3  # at a batch whose loss turns NaN
CHECK_EVERY = 25  # steps between looks at the loss: each look is a host synchronisation on a GPU
log = logging.getLogger(__name__)


def source(teacher: Teacher, config: DeepInversionConfig, key: str, device: torch.device) -> BatchSource:
    """Batches of inverted images. `ValueError` for a teacher without BatchNorm statistics.

    The teacher's own network is not touched: the source works on a copy, on `device`.
    """
    devices.check_precision(config.precision, device, config.fast)
    network = devices.place(freeze(deepcopy(teacher.network)), device, channels_last=config.channels_last)
    batchnorm.require_layers(network)
    run = compiled(network) if config.compile else network
    space, num_classes = teacher.info.space, teacher.info.num_classes

    def batch(index: int) -> Batch:
        start = time.perf_counter()
        with devices.numerics(config.precision, device, config.num_threads, config.fast):
            labels = (torch.arange(config.batch_size) + index * config.batch_size) % num_classes

            def attempt(number: int) -> tuple[Tensor, int]:
                seed = batch_seed(key, index)
                generator = torch.Generator().manual_seed(mix_seed(seed, number) if number else seed)
                slower = config.model_copy(update={"learning_rate": config.learning_rate / 2**number})
                start_parts = initial_parts(config, teacher.info.image_shape, generator, device)
                return invert(network, run, slower, space, start_parts, labels.to(device), generator)

            (images, steps), num_attempts = with_attempts(attempt, f"batch {index} of {key[:12]}")
            stored = encode(images, space, config.storage)
            terms = measure(network, config, decode(stored, space, device), labels.to(device), num_classes)
        terms |= {"num_steps": steps, "num_attempts": num_attempts, "wall_s": time.perf_counter() - start}
        return Batch(index, stored, labels.numpy(), key, terms)

    return batch


def with_attempts(attempt: Callable[[int], tuple[Tensor, int]], what: str) -> tuple[tuple[Tensor, int], int]:
    """What the first attempt gives whose loss stays finite, and its number (from 1).

    The second and third start from other noise at half the learning rate each: still a function of (teacher, config,
    i), so a batch that turns NaN is the same batch wherever and whenever it is made.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt(number), number + 1
        except FloatingPointError as error:
            if number == ATTEMPTS - 1:
                raise FloatingPointError(f"{error} (attempt {ATTEMPTS} of {ATTEMPTS})") from None
            log.warning("%s: %s; starting it again from other noise at half the learning rate", what, error)
    raise AssertionError


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The compiled network where that can work, else the network itself, with a line in the log that says so."""
    if next(network.parameters()).device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        log.warning("compile=true: no C++ compiler found (g++ or clang++); running without torch.compile")
        return network
    return torch.compile(network, dynamic=False)


def initial_parts(
    config: DeepInversionConfig, image_shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """Gaussian noise to start from: N(0, 1) pixels, or one part per resolution, the finest first.

    The pyramid halves the resolution while at least 4 pixels are left; finer parts start smaller, as in images.
    """
    c, h, w = image_shape
    parts = []
    for level in range(1 + max(0, int(math.log2(min(h, w) / 4))) if config.parametrisation == "pyramid" else 1):
        size = (config.batch_size, c, -(-h // 2**level), -(-w // 2**level))
        amplitude = min(0.2 * (level + 1), 0.6) if config.parametrisation == "pyramid" else 1.0
        parts.append((amplitude * torch.randn(size, generator=generator)).to(device))
    return parts


def compose(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the parts, each upsampled to the finest one's size."""
    size = parts[0].shape[2:]
    coarse = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts[1:]]
    return sum(coarse, start=parts[0])


def learning_rate(config: DeepInversionConfig | RecordsConfig, step: int) -> float:
    """Adam's learning rate at `step`."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * step / config.num_steps)) / 2


def invert(
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    config: DeepInversionConfig,
    space: PixelSpace,
    parts: Sequence[Tensor],
    labels: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Optimise the parts of images; returns the images (normalised, within the pixel range) and the steps taken.

    `FloatingPointError` when the loss is no longer finite.
    """
    low, high = space.bounds(labels.device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    variables = [part.clone().requires_grad_(True) for part in parts]
    optimiser = torch.optim.Adam(variables, lr=config.learning_rate)
    best, checks_since_best, steps = math.inf, 0, 0
    with batchnorm.recorded(network) as statistics:
        for step in range(config.num_steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step)
            statistics.clear()
            images = torch.clamp(compose(variables), low, high)
            with devices.autocast(config.precision, images.device):
                logits = run(augmented(images, config, generator).contiguous(memory_format=layout)).float()
            loss = total(config, terms(config, images, logits, labels, statistics))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if len(variables) == 1:
                with torch.no_grad():
                    variables[0].copy_(torch.clamp(variables[0], low, high))
            steps = step + 1
            if steps % CHECK_EVERY and steps < config.num_steps:
                continue
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"synthesis: the loss is {value} at step {steps}; lower learning_rate")
            best, checks_since_best = (value, 0) if value < best * 0.999 else (best, checks_since_best + 1)
            if config.plateau_patience and checks_since_best >= config.plateau_patience:
                break
    return torch.clamp(compose(variables), low, high).detach(), steps


def augmented(images: Tensor, config: DeepInversionConfig, generator: torch.Generator) -> Tensor:
    """The whole batch shifted cyclically and, in half of the steps, mirrored: one draw a step, no synchronisation."""
    if config.jitter:
        dy, dx = torch.randint(-config.jitter, config.jitter + 1, (2,), generator=generator).tolist()
        images = torch.roll(images, (dy, dx), dims=(2, 3))
    if config.flip and float(torch.rand((), generator=generator)) < 0.5:
        images = images.flip(3)
    return images


def terms(
    config: DeepInversionConfig, images: Tensor, logits: Tensor, labels: Tensor, statistics: batchnorm.Statistics
) -> dict[str, Tensor]:
    """Every unweighted term by its name."""
    bn = torch.zeros((), device=images.device)
    for position, layer in enumerate(statistics.layers):
        assert layer.running_mean is not None and layer.running_var is not None
        distance = losses.batchnorm_distance(
            statistics.means[position], statistics.variances[position], layer.running_mean, layer.running_var
        )
        bn = bn + (config.bn_first_multiplier * distance if position == 0 else distance)
    label = F.cross_entropy(logits, labels) if config.label_loss == "cross_entropy" else losses.output_entropy(logits)
    return {"label": label, "bn": bn, "tv": losses.total_variation(images), "l2": losses.mean_square(images)}


def total(config: DeepInversionConfig, terms: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the terms."""
    weights = {
        "label": config.label_weight,
        "bn": config.bn_weight,
        "tv": config.tv_weight,
        "l2": config.l2_weight,
    }
    return torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()


@torch.no_grad()
def measure(
    network: nn.Module, config: DeepInversionConfig, images: Tensor, labels: Tensor, num_classes: int
) -> dict[str, Any]:
    """The terms of the images as stored, without jitter: plus teacher confidence, accuracy and class histogram."""
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with batchnorm.recorded(network) as statistics, devices.autocast(config.precision, images.device):
        logits = network(images).float()
        measured = {name: float(term) for name, term in terms(config, images, logits, labels, statistics).items()}
    predicted = logits.argmax(dim=1)
    return measured | {
        "confidence": float(logits.softmax(dim=1).amax(dim=1).mean()),
        "label_agreement": float((predicted == labels).float().mean()),
        "class_histogram": torch.bincount(predicted, minlength=num_classes).tolist(),
    }
