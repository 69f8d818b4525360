"""What the methods share that optimise images: batches with their attempts, pyramids, learning rates, terms.

A batch whose loss turns NaN is started again from other noise at half the learning rate: still a function of (teacher,
config, i), so it is the same batch wherever and whenever it is made.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_ray import batchnorm, devices, losses
from dfkd_ray.batches import Batch, BatchSource, batch_seed, mix_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.images import decode, encode

ATTEMPTS = 3  # at a batch whose loss turns NaN
CHECK_EVERY = 25  # steps between looks at the loss: each look is a host synchronisation on a GPU
# What a method makes of (config, labels, generator, seed): normalised images, the steps taken, and what measures the
# images as they are stored.
Make = Callable[[Any, Tensor, torch.Generator, int], tuple[Tensor, int, Callable[[Tensor], dict[str, Any]]]]
Result = TypeVar("Result")
log = logging.getLogger(__name__)


def batches(teacher: Teacher, config: Any, key: str, device: torch.device, make: Make) -> BatchSource:
    """Batches of optimised images, with labels that cycle over the classes, on through the batches."""
    space, num_classes = teacher.info.space, teacher.info.num_classes

    def batch(index: int) -> Batch:
        start, seed = time.perf_counter(), batch_seed(key, index)
        with devices.numerics(config.precision, device, config.num_threads, getattr(config, "fast", False)):
            labels = (torch.arange(config.batch_size) + index * config.batch_size) % num_classes

            def attempt(number: int) -> tuple[Tensor, int, Callable[[Tensor], dict[str, Any]]]:
                generator = torch.Generator().manual_seed(mix_seed(seed, number) if number else seed)
                slower = config.model_copy(update={"learning_rate": config.learning_rate / 2**number})
                return make(slower, labels, generator, seed)

            (images, steps, measure), num_attempts = with_attempts(attempt, f"batch {index} of {key[:12]}")
            stored = encode(images, space, config.storage)
            terms = measure(decode(stored, space, device))
        terms |= {"num_steps": steps, "num_attempts": num_attempts, "wall_s": time.perf_counter() - start}
        return Batch(index, stored, labels.numpy(), key, terms)

    return batch


def with_attempts(attempt: Callable[[int], Result], what: str) -> tuple[Result, int]:
    """What the first attempt gives whose loss stays finite, and its number (from 1)."""
    for number in range(ATTEMPTS):
        try:
            return attempt(number), number + 1
        except FloatingPointError as error:
            if number == ATTEMPTS - 1:
                raise FloatingPointError(f"{error} (attempt {ATTEMPTS} of {ATTEMPTS})") from None
            log.warning("%s: %s; starting it again from other noise at half the learning rate", what, error)
    raise AssertionError


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of the parts of a pyramid, the finest first; halved while at least 4 pixels are left."""
    levels = 1 + max(0, int(math.log2(min(height, width) / 4)))
    return [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]


def compose(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the parts, each upsampled to the finest one's size."""
    size = parts[0].shape[2:]
    coarse = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts[1:]]
    return sum(coarse, start=parts[0])


def learning_rate(config: Any, step: int) -> float:
    """Adam's learning rate at `step`."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * step / config.num_steps)) / 2


def set_learning_rate(optimiser: torch.optim.Optimizer, config: Any, step: int) -> None:
    """Give every group of the optimiser the learning rate of `step`."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)


def looked_at(loss: Tensor, steps: int, num_steps: int) -> float | None:
    """The loss, where it is time for a look at it after that many steps. `FloatingPointError` when it is not finite."""
    if steps % CHECK_EVERY and steps < num_steps:
        return None
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"synthesis: the loss is {value} at step {steps}; lower learning_rate")
    return value


def bn_term(statistics: batchnorm.Statistics, device: torch.device, first_multiplier: float = 1.0) -> Tensor:
    """The BatchNorm distances of all layers, summed; the first layer's times `first_multiplier`."""
    bn = torch.zeros((), device=device)
    for position, layer in enumerate(statistics.layers):
        assert layer.running_mean is not None and layer.running_var is not None
        distance = losses.batchnorm_distance(
            statistics.means[position], statistics.variances[position], layer.running_mean, layer.running_var
        )
        bn = bn + (first_multiplier * distance if position == 0 else distance)
    return bn


def total(config: Any, terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms, each times the config's field `<name>_weight`."""
    weights = {name: getattr(config, f"{name}_weight") for name in terms}
    return torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()


def measured(terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor, num_classes: int) -> dict[str, Any]:
    """Terms as numbers, and what the teacher says of the images: confidence, accuracy, class histogram."""
    predicted = logits.argmax(dim=1)
    return {name: float(term) for name, term in terms.items()} | {
        "confidence": float(logits.softmax(dim=1).amax(dim=1).mean()),
        "label_agreement": float((predicted == labels).float().mean()),
        "class_histogram": torch.bincount(predicted, minlength=num_classes).tolist(),
    }
