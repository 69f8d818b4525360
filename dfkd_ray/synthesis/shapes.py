"""Random overlapping shapes ("dead leaves"): images that depend on the teacher's image size and pixel range alone.

Source: Lee, Mumford and Huang 2001, "Occlusion models for natural images"; as training images: Baradad et al. 2021,
arXiv 2106.05963. Colours are N(mean, std) per channel, as for noise.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dfkd_ray.batches import BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import ShapesConfig
from dfkd_ray.images import PixelSpace, encode
from dfkd_ray.synthesis import noise

NUM_SHAPES = 40  # of an image, each over the ones before
SMALLEST = 2.0  # radius, pixels


def source(teacher: Teacher, config: ShapesConfig, key: str, device: torch.device) -> BatchSource:
    """Batches of shapes, drawn on the CPU whatever `device` is."""
    return noise.drawn(teacher, config, key, drawn)


def stored(shape: Sequence[int], space: PixelSpace, seed: int) -> np.ndarray:
    """Images of a shape (num_images, channels, height, width) as float32 in pixel units."""
    num_images, *image_shape = shape
    return encode(drawn(num_images, image_shape, torch.Generator().manual_seed(seed)), space, "float32")


def drawn(num_images: int, image_shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normalised images (num_images, channels, height, width), not clipped.

    Each shape is an ellipse or a rectangle of a random place, angle and ratio of sides. Its radius reaches half of the
    shorter side (of a signal: of its length), and small ones are more frequent. Edges are a pixel wide.
    """
    channels, height, width = image_shape
    largest = max(SMALLEST, (width if height == 1 else min(height, width)) / 2)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")

    def uniform() -> Tensor:
        return torch.rand(num_images, 1, 1, generator=generator)

    def colour() -> Tensor:
        return torch.randn(num_images, channels, 1, 1, generator=generator)

    images = colour().expand(num_images, channels, height, width)
    for _ in range(NUM_SHAPES):
        dy, dx = y - uniform() * height, x - uniform() * width
        radius = SMALLEST + (largest - SMALLEST) * uniform() ** 2
        angle, stretch = uniform() * math.pi, torch.exp(0.5 * torch.randn(num_images, 1, 1, generator=generator))
        along = (dx * angle.cos() + dy * angle.sin()) / stretch
        across = (dy * angle.cos() - dx * angle.sin()) * stretch
        ellipse, rectangle = torch.hypot(along, across), torch.maximum(along.abs(), across.abs())
        distance = torch.where(uniform() < 0.5, ellipse, rectangle)
        covers = torch.sigmoid(2 * (radius - distance))[:, None]
        images = torch.lerp(images, colour(), covers)
    return images
