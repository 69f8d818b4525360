"""Adaptive DeepInversion: rounds of images that are moved to where the student differs from the teacher.

Round 0 is plain DeepInversion with its keys and bytes, so that trials share it and the cache has it. Batch i of a later
round starts from batch i of round 0 and adds `adversarial_weight` times the student's term: the divergence on images to
which the student gives the teacher's class. Elsewhere it has no gradient, so images do not leave their class for it.
Source: Yin et al. 2020, arXiv 1912.08795, section 3.3 (the paper inverts again from noise, with a bounded
Jensen-Shannon divergence and no mask); the mask: Fang et al. 2021, arXiv 2105.08584, equation 8.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices
from dfkd_ray.batches import Batch, BatchSource, RoundState
from dfkd_ray.bundles import Teacher, freeze
from dfkd_ray.config import AdiConfig, DeepInversionConfig
from dfkd_ray.heads import HEADS
from dfkd_ray.images import decode
from dfkd_ray.synthesis import deepinversion
from dfkd_ray.synthesis.optimiser import Aim, Made, batches, pyramid_sizes, require_classes

pin = deepinversion.pin


def plain(config: AdiConfig) -> DeepInversionConfig:
    """The stationary method whose images are those of round 0."""
    return config.plain


def source(
    teacher: Teacher,
    config: AdiConfig,
    key: str,
    device: torch.device,
    state: RoundState,
    student: nn.Module | None,
) -> BatchSource:
    """Batches of a later round: those of round 0, moved. `ValueError` for a teacher without BatchNorm statistics."""
    devices.check_precision(config.precision, device, config.fast)
    config = pin(teacher, config)
    network = devices.place(freeze(deepcopy(teacher.network)), device, channels_last=config.channels_last)
    batchnorm.require_layers(network)
    run = deepinversion.compiled(network) if config.compile else network
    space, head, size = teacher.info.space, HEADS[teacher.info.head], config.batch_size
    moved = config.model_copy(update={"num_steps": config.adaptive_steps})

    def batch(index: int) -> Batch:
        rows = slice(index * size, (index + 1) * size)
        labels = torch.from_numpy(np.array(state.arrays["labels"][rows]))
        aim = Aim(labels.to(device), head)

        def make(slower: AdiConfig, _labels: Tensor, generator: torch.Generator, _seed: int) -> Made:
            rate = config.adaptive_learning_rate * slower.learning_rate / config.learning_rate
            there = slower.model_copy(update={"learning_rate": rate})
            parts = parts_of(decode(np.array(state.arrays["images"][rows]), space, device), config)
            images, steps = deepinversion.invert(network, run, there, space, parts, aim, generator, student)

            def measure(stored: Tensor) -> dict[str, Any]:
                return deepinversion.measure(network, config, stored, aim, student)

            return Made(images, steps, measure, labels=labels, student_passes=int(student is not None))

        return batches(teacher, moved, key, device, make)(index)

    return batch


def check(teacher: Teacher, config: AdiConfig, where: str) -> None:
    """`ValueError` for a teacher whose BatchNorm statistics cannot be matched, or whose classes are no classes."""
    deepinversion.check(teacher, config, where)
    require_classes(teacher, config, where)


def parts_of(images: Tensor, config: AdiConfig) -> list[Tensor]:
    """Variables whose sum is `images`: the pixels, or a pyramid that begins with zeros at the coarser resolutions."""
    if config.parametrisation == "pixel":
        return [images]
    n, c, h, w = images.shape
    return [images, *(images.new_zeros(n, c, *size) for size in pyramid_sizes(h, w)[1:])]


def first_state(teacher: Teacher, config: AdiConfig) -> dict[str, np.ndarray]:
    """Round 0 depends on nothing else."""
    return {}


def advance(
    teacher: Teacher,
    config: AdiConfig,
    state: RoundState,
    contributions: Mapping[str, np.ndarray],
    student: nn.Module | None,
) -> dict[str, np.ndarray]:
    """The images and labels of round 0: every later round starts from them."""
    kept = contributions if state.number == 0 else state.arrays
    return {"images": kept["images"], "labels": kept["labels"]}
