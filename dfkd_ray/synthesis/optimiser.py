"""Shared by the methods that optimise images: batches with retries, image pyramids, learning rates, loss terms.

A batch whose loss is not finite is restarted from other noise at half the learning rate. It is still a pure function
of (teacher, config, i), so every process makes the same batch.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_ray import batchnorm, devices, losses
from dfkd_ray.batches import Batch, BatchSource, batch_seed, mix_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.heads import HEADS, Head
from dfkd_ray.images import decode, encode

ATTEMPTS = 3  # for a batch whose loss is not finite
CHECK_EVERY = 25  # steps between checks of the loss: each one synchronises a GPU with the host
Result = TypeVar("Result")


class Made(NamedTuple):
    """The images of a batch, normalised; the steps taken; a function that measures the terms of the images as stored.

    `contribution`: the batch's summand of the next round's state. `labels`: those of the images, None for the given.
    `teacher_passes`, `student_passes`: how often a step takes the batch through these networks; a forward pass and its
    backward pass are one.
    """

    images: Tensor
    num_steps: int
    measure: Callable[[Tensor], dict[str, Any]]
    contribution: Mapping[str, np.ndarray] = MappingProxyType({})
    labels: Tensor | None = None
    teacher_passes: int = 1
    student_passes: int = 0


# A method's function of (config, labels, generator, seed).
Make = Callable[[Any, Tensor, torch.Generator, int], Made]


@dataclass(frozen=True)
class Aim:
    """What the images of a batch are made for: labels (n,), and the teacher's head, which says what they mean."""

    labels: Tensor
    head: Head


log = logging.getLogger(__name__)


def batches(teacher: Teacher, config: Any, key: str, device: torch.device, make: Make) -> BatchSource:
    """Batches of optimised images, with the labels that suit the teacher's head."""
    space, num_classes = teacher.info.space, teacher.info.num_classes

    def batch(index: int) -> Batch:
        start, seed = time.perf_counter(), batch_seed(key, index)
        with devices.numerics(config.precision, device, config.num_threads, getattr(config, "fast", False)):
            labels = HEADS[teacher.info.head].labels(key, index, config.batch_size, num_classes)

            def attempt(number: int) -> Made:
                generator = torch.Generator().manual_seed(mix_seed(seed, number) if number else seed)
                slower = config.model_copy(update={"learning_rate": config.learning_rate / 2**number})
                return make(slower, labels, generator, seed)

            made, num_attempts = with_attempts(attempt, f"batch {index} of {key[:12]}")
            stored = encode(made.images, space, config.storage)
            terms = made.measure(decode(stored, space, device))
        through = made.num_steps * config.batch_size
        terms |= {"num_teacher_passes": made.teacher_passes * through}
        terms |= {"num_student_passes": made.student_passes * through}
        terms |= {"num_steps": made.num_steps, "num_attempts": num_attempts, "wall_s": time.perf_counter() - start}
        labels = labels if made.labels is None else made.labels.cpu()
        return Batch(index, stored, labels.numpy(), key, terms, made.contribution)

    return batch


def require_classes(teacher: Teacher, config: Any, where: str) -> None:
    """`ValueError` for a teacher of independent labels; `where`: the config's dotted name."""
    if teacher.info.head != "softmax":
        raise ValueError(
            f"{where}.method={config.method}: the teacher's head is {teacher.info.head}, expected softmax: this method "
            f"compares classes that exclude each other; use {where}.method=deepinversion"
        )


def require_statistics(teacher: Teacher, config: Any, where: str, otherwise: str) -> None:
    """`ValueError` for a teacher whose BatchNorm statistics cannot be matched; `otherwise`: what to set instead."""
    try:
        batchnorm.check_recording(teacher.network, teacher.info.image_shape)
    except ValueError as error:
        raise ValueError(f"{where}.method={config.method}: {error}; or {where}.{otherwise}") from None


def with_attempts(attempt: Callable[[int], Result], what: str) -> tuple[Result, int]:
    """The result of the first attempt whose loss stays finite, and its number (from 1)."""
    for number in range(ATTEMPTS):
        try:
            return attempt(number), number + 1
        except FloatingPointError as error:
            if number == ATTEMPTS - 1:
                raise FloatingPointError(f"{error} (attempt {ATTEMPTS} of {ATTEMPTS})") from None
            log.warning("%s: %s; starting it again from other noise at half the learning rate", what, error)
    raise AssertionError


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of the levels of a pyramid, finest first; halved as long as the shorter side stays at least 4."""
    levels = 1 + max(0, int(math.log2(min(height, width) / 4)))
    return [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]


def compose(parts: Sequence[Tensor]) -> Tensor:
    """The image of a pyramid: the sum of its levels, each upsampled to the finest level's size."""
    size = parts[0].shape[2:]
    coarse = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts[1:]]
    return sum(coarse, start=parts[0])


def augmented(images: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    """The batch, shifted cyclically and mirrored with probability 1/2: one draw per step, no GPU synchronisation."""
    if config.jitter:
        dy, dx = torch.randint(-config.jitter, config.jitter + 1, (2,), generator=generator).tolist()
        images = torch.roll(images, (dy, dx), dims=(2, 3))
    if config.flip and images.shape[2] > 1 and float(torch.rand((), generator=generator)) < 0.5:
        images = images.flip(3)
    return images


def learning_rate(config: Any, step: int) -> float:
    """Adam's learning rate at `step`."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * step / config.num_steps)) / 2


def set_learning_rate(optimiser: torch.optim.Optimizer, config: Any, step: int) -> None:
    """Set the learning rate of `step` in every parameter group."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)


def looked_at(loss: Tensor, steps: int, num_steps: int) -> float | None:
    """The loss every `CHECK_EVERY` steps and at the last step, else None. `FloatingPointError` if it is not finite."""
    if steps % CHECK_EVERY and steps < num_steps:
        return None
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"synthesis: the loss is {value} at step {steps}; lower learning_rate")
    return value


def bn_term(statistics: batchnorm.Statistics, device: torch.device, first_multiplier: float = 1.0) -> Tensor:
    """The sum of the BatchNorm distances of all layers; the first layer's is multiplied by `first_multiplier`."""
    bn = torch.zeros((), device=device)
    for position, layer in enumerate(statistics.layers):
        assert layer.running_mean is not None and layer.running_var is not None
        distance = losses.batchnorm_distance(
            statistics.means[position], statistics.variances[position], layer.running_mean, layer.running_var
        )
        bn = bn + (first_multiplier * distance if position == 0 else distance)
    return bn


def total(config: Any, terms: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of the terms; the weight of term `<name>` is the config's field `<name>_weight`."""
    weights = {name: getattr(config, f"{name}_weight") for name in terms}
    return torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()


def measured(terms: Mapping[str, Tensor], logits: Tensor, aim: Aim) -> dict[str, Any]:
    """The terms as numbers, and the teacher's confidence, agreement with the labels, and class histogram."""
    return {name: float(term) for name, term in terms.items()} | {
        "confidence": float(aim.head.confidence(logits)),
        "label_agreement": float(aim.head.agrees(logits, aim.labels).float().mean()),
        "class_histogram": aim.head.histogram(logits),
    }
