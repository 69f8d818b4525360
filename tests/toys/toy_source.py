"""What the toy methods make, and how the one that looks at the student goes from round to round."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from toy_methods import ToyRoundsConfig

from dfkd_ray.batches import Batch, BatchSource, RoundState, batch_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.images import encode


def source(
    teacher: Teacher,
    config: Any,
    key: str,
    device: torch.device,
    state: RoundState | None = None,
    student: nn.Module | None = None,
) -> BatchSource:
    """Batches of either."""
    shift = 0.0
    if state is not None:
        shift = float(state.arrays["shift"]) + config.student_weight * weight_of(student)

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(batch_seed(key, index))
        images = torch.randn(config.batch_size, *teacher.info.image_shape, generator=generator) + shift
        labels = (np.arange(config.batch_size) + index) % teacher.info.num_classes
        terms = {"sharpness": float(images.std())} if state is None else {"shift": shift}
        added = {} if state is None else {"shift": np.asarray(float(images.double().mean()))}
        stored = encode(images, teacher.info.space, config.storage)
        return Batch(index, stored, labels.astype(np.int64), key, {**terms, "wall_s": 0.25}, added)

    return batch


def first_state(teacher: Teacher, config: ToyRoundsConfig) -> dict[str, np.ndarray]:
    """It has moved nothing yet."""
    return {"shift": np.zeros(())}


def advance(
    teacher: Teacher,
    config: ToyRoundsConfig,
    state: RoundState,
    contributions: Mapping[str, np.ndarray],
    student: nn.Module | None,
) -> dict[str, np.ndarray]:
    """Moved further by what the batches add up to."""
    assert (student is not None) == (config.student_weight > 0)
    return {"shift": state.arrays["shift"] + 0.1 * contributions["shift"]}


def weight_of(student: nn.Module | None) -> float:
    """The mean of a student's weights; 0 without a student."""
    if student is None:
        return 0.0
    assert not student.training
    return float(torch.cat([weight.double().flatten() for weight in student.parameters()]).mean())
