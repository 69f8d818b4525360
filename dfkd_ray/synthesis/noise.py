"""Gaussian noise images: the lower baseline. N(mean, std) per channel, clipped to the pixel range, without labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_ray.batches import NO_LABEL, Batch, BatchSource, batch_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import NoiseConfig
from dfkd_ray.images import encode

# Number of images, (channels, height, width), generator → normalised images.
Draw = Callable[[int, Sequence[int], torch.Generator], Tensor]


def source(teacher: Teacher, config: NoiseConfig, key: str, device: torch.device) -> BatchSource:
    """Batches of noise, drawn on the CPU whatever `device` is."""
    return drawn(teacher, config, key, lambda num, shape, generator: torch.randn(num, *shape, generator=generator))


def drawn(teacher: Teacher, config: Any, key: str, draw: Draw) -> BatchSource:
    """Batches of images that are drawn without the network, and have no labels."""

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(batch_seed(key, index))
        images = draw(config.batch_size, teacher.info.image_shape, generator)
        labels = np.full(config.batch_size, NO_LABEL, np.int64)
        return Batch(index, encode(images, teacher.info.space, config.storage), labels, key)

    return batch
