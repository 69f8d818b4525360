"""Gaussian noise images: the lower baseline. N(mean, std) per channel, clipped to the pixel range, without labels."""

import numpy as np
import torch

from dfkd_ray.batches import NO_LABEL, Batch, BatchSource, batch_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import NoiseConfig
from dfkd_ray.images import encode


def source(teacher: Teacher, config: NoiseConfig, key: str, device: torch.device) -> BatchSource:
    """Batches of noise, drawn on the CPU whatever `device` is."""

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(batch_seed(key, index))
        images = torch.randn(config.batch_size, *teacher.info.image_shape, generator=generator)
        labels = np.full(config.batch_size, NO_LABEL, np.int64)
        return Batch(index, encode(images, teacher.info.space, config.storage), labels, key)

    return batch
