"""Evaluation of networks: accuracy on given test batches, distance from the teacher on the reference set.

It takes batches and opens no data set.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import devices
from dfkd_ray.batches import Batch
from dfkd_ray.devices import Runtime
from dfkd_ray.heads import SOFTMAX, Head
from dfkd_ray.images import PixelSpace, decoded
from dfkd_ray.text import one_line

EVALUATION_BATCH = 500
MIXING_SEED = 0x312


@torch.no_grad()
def logits(network: nn.Module, images: np.ndarray, runtime: Runtime) -> Tensor:
    """Float32 logits (num_images, classes) of stored images, on the network's device; runs it in eval mode."""
    network.eval()
    if images.ndim == 3:  # signals (n, channels, length), as a caller of the Python interface may hand them in
        images = images[:, :, None]
    parts = []
    slices = (images[start : start + EVALUATION_BATCH] for start in range(0, len(images), EVALUATION_BATCH))
    for x in decoded(slices, runtime.space, runtime.device):
        with runtime.autocast():
            parts.append(network(devices.laid_out(x, network)).float())
    return torch.cat(parts)


def accuracy(network: nn.Module, batches: Iterable[Batch], runtime: Runtime, head: Head = SOFTMAX) -> float:
    """Accuracy in [0, 1]; of independent labels (n, classes) the share of right ones.

    `ValueError` for labels that are not of the network's classes, or if there is no image.
    """
    hits = total = 0
    for batch in batches:
        predicted = logits(network, batch.images, runtime)
        check_labels(batch, predicted.shape[1], head)
        right = head.agrees(predicted.cpu(), torch.from_numpy(np.array(batch.labels)))
        hits, total = hits + int(right.sum()), total + right.numel()
    if total == 0:
        raise ValueError("the test set has no images")
    return hits / total


def check_labels(batch: Batch, num_classes: int, head: Head) -> None:
    """`ValueError` unless a batch has a class per image, or for independent labels 0 or 1 for each label."""
    labels, num_images = np.asarray(batch.labels), len(batch.images)
    expected = (num_images,) if head is SOFTMAX else (num_images, num_classes)
    if labels.shape != expected:
        what = "a class for each image" if head is SOFTMAX else "0 or 1 for each of its independent labels"
        raise ValueError(f"the test set has labels of shape {labels.shape}, expected {expected}: {what}")
    most = num_classes if head is SOFTMAX else 2
    if labels.size and (labels.max() >= most or labels.min() < 0):
        wanted = f"the network has {num_classes} classes" if head is SOFTMAX else "independent labels are 0 or 1"
        raise ValueError(f"the test set has labels from {labels.min()} to {labels.max()}, {wanted}")


def check_test(batches: Iterable[Batch], image_shape: Sequence[int], num_classes: int, head: Head) -> None:
    """`ValueError` for test images of another shape than the network's, or for wrong labels, before anything is run."""
    for batch in batches:
        found = batch.images.shape[1:]
        if found != tuple(image_shape) and (image_shape[1] > 1 or found != (image_shape[0], image_shape[2])):
            shown, own = ("x".join(map(str, shape)) for shape in (found, image_shape))
            raise ValueError(f"the test set has images of {shown}, the network takes {own}")
        check_labels(batch, num_classes, head)


def test_set(batches: Sequence[Batch]) -> dict[str, Any]:
    """Name, number of images and SHA-256 of a test set: of its stored images and its labels, however it is batched."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(np.ascontiguousarray(batch.images).data.cast("B"))
    for batch in batches:
        digest.update(np.ascontiguousarray(batch.labels, "<i8").data.cast("B"))
    num_images = sum(len(batch.labels) for batch in batches)
    return {"name": one_line(batches[0].key, 120), "num_images": num_images, "sha256": digest.hexdigest()}


def mixtures(images: np.ndarray, space: PixelSpace, others: np.ndarray | None = None) -> np.ndarray:
    """Each stored image mixed with another one: λ a + (1 - λ) b, λ ~ U(0, 1), as float32 in pixel units.

    The teacher is sure of the images themselves, and every usable student agrees with it on all of them. Between two
    classes students differ. `others`: the images b, of the same shape and stored as float32; None: the images
    themselves, in pairs. Pairs and λ depend on the number of images alone: all trials are compared on the same set.
    """
    generator = torch.Generator().manual_seed(MIXING_SEED)
    order = torch.randperm(len(images), generator=generator).numpy()
    shares = torch.rand(len(images), generator=generator).numpy().reshape(-1, *[1] * (images.ndim - 1))
    pixels = images.astype(np.float32)
    if images.dtype == np.uint8:
        pixels = pixels * np.float32((space.high - space.low) / 255.0) + np.float32(space.low)
    if others is None:
        others = np.empty_like(pixels)
        others[order] = pixels[np.roll(order, 1)]
    return shares * pixels + (1 - shares) * others


@dataclass(frozen=True)
class Reference:
    """The reference images, the teacher's float32 logits on them, and the runtime for students."""

    images: np.ndarray
    teacher_logits: Tensor
    runtime: Runtime
    head: Head = SOFTMAX

    def compare(self, network: nn.Module) -> tuple[float, float]:
        """Agreement (share of equal argmax, in [0, 1]) and KL(teacher || network) in nats at temperature 1.

        The KL is infinite where it is not a number: the lowest one selects, and no number is lower than NaN.
        """
        return self.distance(logits(network, self.images, self.runtime))

    def distance(self, student: Tensor) -> tuple[float, float]:
        """The same for the float32 logits (num_images, classes) that a network has given on the images."""
        student = student.to(self.teacher_logits.device)
        same = self.head.agreement(student, self.teacher_logits)
        kl = float(self.head.kl(student, self.teacher_logits, 1.0))
        return same, math.inf if math.isnan(kl) else kl


def reference(teacher: nn.Module, images: np.ndarray, runtime: Runtime, head: Head = SOFTMAX) -> Reference:
    """The reference set for these stored images."""
    return Reference(images, logits(teacher, images, runtime), runtime, head)
