"""Pixel spaces with encoding and decoding of stored images, and augmentation. Pure: randomness is an argument.

There are three spaces: *stored* (uint8 over the pixel range, float16 or float32), *pixels* (`low` to `high`, usually 0
to 1) and *normalised* ((pixel - mean) / std), the input of networks. Decoding always makes a new tensor, so nothing can
write into a shared stored batch.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from dfkd_ray.batches import NO_LABEL, Batch

SHEET = 1200  # pixels of a picture's side
LARGEST_ASPECT = 4 / 3  # of a crop, relative to the image's own
PLOT = (48, 160)  # height and width of a signal in a picture, pixels
STORAGE_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class PixelSpace:
    """Per-channel mean and standard deviation, and the range of a pixel, all in pixel units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: float = 0.0
    high: float = 1.0

    def per_channel(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32, each shaped (1, channels, 1, 1)."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        return mean, std

    def bounds(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The pixel range in normalised units, each shaped (1, channels, 1, 1)."""
        mean, std = self.per_channel(device)
        return (self.low - mean) / std, (self.high - mean) / std


def encode(images: Float[Tensor, "n c h w"], space: PixelSpace, storage: str) -> np.ndarray:
    """Normalised images in stored form, clipped to the pixel range."""
    mean, std = space.per_channel(images.device)
    pixels = (images.detach().float() * std + mean).clamp(space.low, space.high)
    if storage == "uint8":
        pixels = ((pixels - space.low) * (255.0 / (space.high - space.low))).round()
    return pixels.to(STORAGE_DTYPES[storage]).contiguous().cpu().numpy()


def decode(images: np.ndarray | Tensor, space: PixelSpace, device: torch.device | str = "cpu") -> Tensor:
    """Stored images as normalised float32, always a new tensor."""
    if isinstance(images, np.ndarray):
        # from_numpy warns about a read-only view (object store, memory map); dlpack does not, and this only reads.
        try:
            images = torch.from_dlpack(np.ascontiguousarray(images))
        except BufferError:  # older numpy or torch: no dlpack for read-only memory
            images = torch.tensor(images)
    pixels = images.to(device, non_blocking=True).to(torch.float32)
    mean, std = space.per_channel(device)
    if images.dtype == torch.uint8:
        return pixels * ((space.high - space.low) / 255.0 / std) + (space.low - mean) / std
    return (pixels - mean) / std


def decoded(arrays: Iterable[np.ndarray], space: PixelSpace, device: torch.device) -> Iterator[Tensor]:
    """Stored arrays as normalised float32 on the device, in order.

    On CUDA the next array is copied (pinned memory, separate stream) while the current one is in use.
    """
    if device.type != "cuda":
        for array in arrays:
            yield decode(array, space, device)
        return
    side = torch.cuda.Stream(device)
    travelling: Tensor | None = None

    def depart(array: np.ndarray) -> Tensor:
        pinned = torch.from_numpy(np.array(array)).pin_memory()
        with torch.cuda.stream(side):
            return pinned.to(device, non_blocking=True)

    for array in arrays:
        arrived, travelling = travelling, depart(array)
        if arrived is not None:
            yield landed(arrived, space, device, side)
    if travelling is not None:
        yield landed(travelling, space, device, side)


def landed(images: Tensor, space: PixelSpace, device: torch.device, side: Any) -> Tensor:
    """Decode images whose copy on another stream may still be running."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    images.record_stream(current)
    return decode(images, space, device)


def shift_images(
    images: Float[Tensor, "n c h w"],
    largest: int,
    fill: Float[Tensor, "1 c 1 1"],
    generator: torch.Generator,
) -> Float[Tensor, "n c h w"]:
    """Move each image by up to `largest` pixels in both directions, filling with `fill`. `generator` is on the CPU.

    An axis of length 1 is left as it is: a signal would be gone.
    """
    if largest == 0:
        return images
    n, c, h, w = images.shape
    padded = fill.expand(n, c, h + 2 * largest, w + 2 * largest).clone()
    padded[:, :, largest : largest + h, largest : largest + w] = images
    offsets = torch.randint(0, 2 * largest + 1, (2, n), generator=generator).to(images.device)
    for axis, side in enumerate((h, w)):
        if side == 1:
            offsets[axis] = largest
    rows = offsets[0][:, None] + torch.arange(h, device=images.device)
    columns = offsets[1][:, None] + torch.arange(w, device=images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip_images(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Mirror each image left to right with probability 1/2. Signals, of height 1, have a direction: they are left."""
    if images.shape[2] == 1:
        return images
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def crop_images(
    images: Float[Tensor, "n c h w"], smallest: float, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """A random crop of each image, resized to the image's size by bilinear interpolation. `generator` is on the CPU.

    Its area is a share of the image's, uniform from `smallest` to 1; the logarithm of its aspect ratio, relative to the
    image's, is uniform up to 3/4 and 4/3, as far as the crop fits. So a crop of share 1 is the image. An axis of length
    1 is left as it is. The interpolation is two products of matrices, whose gradient is deterministic on GPUs.
    """
    n, _, h, w = images.shape
    scale, aspect, top, left = torch.rand(4, n, generator=generator)
    scale = smallest + (1 - smallest) * scale
    limit = torch.clamp(-scale.log(), max=math.log(LARGEST_ASPECT))
    stretch = ((2 * aspect - 1) * limit).exp()
    height, width = (scale / stretch).sqrt().clamp(max=1), (scale * stretch).sqrt().clamp(max=1)
    if min(h, w) == 1:
        height = width = scale
    rows = interpolation(h, height, (1 - height) * h * top).to(images)
    columns = interpolation(w, width, (1 - width) * w * left).to(images)
    return rows[:, None] @ images @ columns.transpose(1, 2)[:, None]


def interpolation(side: int, share: Float[Tensor, " n"], start: Float[Tensor, " n"]) -> Float[Tensor, "n side side"]:
    """Weights of bilinear interpolation along one axis: to `side` pixels from a share of them that begins at `start`.

    Row o has the weights of output pixel o. Pixel centres are at whole numbers; beyond the border is the last pixel.
    """
    places = torch.arange(side, dtype=torch.float32)
    seen = (start[:, None] + (places + 0.5) * share[:, None] - 0.5).clamp(0, side - 1)
    return (1 - (seen[:, :, None] - places).abs()).clamp(min=0)


def mix_images(
    images: Float[Tensor, "n c h w"], share: float, generator: torch.Generator
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Mix a share of the images with partners from the batch.

    Returns the images w x + (1 - w) x[partner], w ~ U(0, 1) for the chosen ones and 1 for the rest, w and partners.
    Source: Zhang et al. 2018, arXiv 1710.09412 (mixup, alpha = 1).
    """
    n = len(images)
    partner = torch.randperm(n, generator=generator).to(images.device)
    chosen = torch.rand(n, generator=generator) < share
    weight = torch.where(chosen, torch.rand(n, generator=generator), torch.ones(n)).to(images.device)
    w = weight[:, None, None, None]
    return w * images + (1 - w) * images[partner], weight, partner


def class_grid(
    batches: Sequence[Batch], num_classes: int, space: PixelSpace, per_class: int = 12, largest: int = 20
) -> bytes:
    """A PNG with a row of images for each of the first `largest` classes; unlabelled noise fills the rows in order.

    With more classes than that and too few images to fill these rows, one image each of classes that are evenly spread
    over all, in their order, on a sheet of at most 1,200 pixels.
    """
    images = np.concatenate([batch.images for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    if (labels == NO_LABEL).all() or labels.max() >= num_classes:  # noise, or seeds of independent labels
        labels = np.arange(len(labels)) % num_classes
    if images.shape[2] == 1 < images.shape[3]:
        images = np.stack([plotted(image, space) for image in images])
    c, h, w = images.shape[1:]
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    filled = classes[(classes >= 0) & (classes < largest) & (counts >= per_class)]
    if num_classes <= largest or len(filled) == largest:
        table = [np.flatnonzero(labels == label)[:per_class] for label in range(min(num_classes, largest))]
    else:
        width, height = (min(most, max(1, SHEET // (side + 2))) for most, side in ((per_class, w), (largest, h)))
        first = first[classes >= 0]
        chosen = first[np.linspace(0, len(first) - 1, min(len(first), width * height)).round().astype(int)]
        table = [chosen[start : start + width] for start in range(0, len(chosen), width)]
    columns = max(map(len, table))
    picture = np.full((c, len(table) * (h + 2) - 2, columns * (w + 2) - 2), 255, np.uint8)
    for row, numbers in enumerate(table):
        for column, image in enumerate(images[numbers]):
            if image.dtype != np.uint8:
                image = (255 * shares(image, space)).round().clip(0, 255).astype(np.uint8)
            picture[:, row * (h + 2) : row * (h + 2) + h, column * (w + 2) : column * (w + 2) + w] = image
    # Grey or colour; for other channel counts, the first channel is shown.
    shown = picture.transpose(1, 2, 0) if c == 3 else picture[0]
    file = io.BytesIO()
    Image.fromarray(shown).save(file, format="PNG")
    return file.getvalue()


def shares(image: np.ndarray, space: PixelSpace) -> np.ndarray:
    """A stored image as float32 shares of the pixel range."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255
    return (image.astype(np.float32) - space.low) / (space.high - space.low)


def plotted(signal: np.ndarray, space: PixelSpace) -> np.ndarray:
    """A signal (channels, 1, length) drawn as curves over the pixel range: uint8 (1, height, width), dark on white."""
    height, width = PLOT
    canvas = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(canvas)
    values = shares(signal[:, 0], space).clip(0, 1)
    steps = np.linspace(0, width - 1, values.shape[1])
    for channel, curve in enumerate(values):
        points = list(zip(steps.tolist(), ((1 - curve) * (height - 1)).tolist(), strict=True))
        draw.line(points, fill=min(160, 50 * channel))
    return np.asarray(canvas)[None]
