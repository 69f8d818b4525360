"""Evaluation of networks: accuracy on given test batches, agreement with the teacher on the reference set.

It takes batches and opens no data set.
"""

import hashlib
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
from dfkd_ray.images import decoded
from dfkd_ray.text import one_line

EVALUATION_BATCH = 500


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

    `ValueError` for labels of another shape or outside the network's classes, or if there is no image.
    """
    hits = total = 0
    for batch in batches:
        predicted = logits(network, batch.images, runtime)
        of_one_class = head is SOFTMAX
        wanted = tuple(predicted.shape)[: 1 if of_one_class else 2]
        if np.shape(batch.labels) != wanted or not (of_one_class or np.isin(batch.labels, (0, 1)).all()):
            meaning = "a class for each image" if of_one_class else "0 or 1 for each of its independent labels"
            raise ValueError(
                f"the test set has labels of shape {np.shape(batch.labels)}, the network wants {meaning}: {wanted}"
            )
        if not of_one_class:
            right = head.agrees(predicted.cpu(), torch.from_numpy(np.array(batch.labels)))
            hits, total = hits + int(right.sum()), total + right.numel()
            continue
        if int(batch.labels.max()) >= predicted.shape[1] or int(batch.labels.min()) < 0:
            raise ValueError(
                f"the test set has labels up to {int(batch.labels.max())}, the network has {predicted.shape[1]} classes"
            )
        hits += int((predicted.argmax(dim=1).cpu().numpy() == batch.labels).sum())
        total += len(batch.labels)
    if total == 0:
        raise ValueError("the test set has no images")
    return hits / total


def test_set(batches: Sequence[Batch]) -> dict[str, Any]:
    """Name, number of images and SHA-256 of a test set: of its stored images and its labels, however it is batched."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(np.ascontiguousarray(batch.images).data.cast("B"))
    for batch in batches:
        digest.update(np.ascontiguousarray(batch.labels, "<i8").data.cast("B"))
    num_images = sum(len(batch.labels) for batch in batches)
    return {"name": one_line(batches[0].key, 120), "num_images": num_images, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Reference:
    """The held-out synthetic set, the teacher's float32 logits on it, and the runtime for students."""

    images: np.ndarray
    teacher_logits: Tensor
    runtime: Runtime
    head: Head = SOFTMAX

    def compare(self, network: nn.Module) -> tuple[float, float]:
        """Agreement (share of equal argmax, in [0, 1]) and KL(teacher || network) in nats at temperature 1."""
        student = logits(network, self.images, self.runtime)
        same = self.head.agreement(student, self.teacher_logits)
        return same, float(self.head.kl(student, self.teacher_logits, 1.0))


def reference(teacher: nn.Module, images: np.ndarray, runtime: Runtime, head: Head = SOFTMAX) -> Reference:
    """The reference set for these stored images."""
    return Reference(images, logits(teacher, images, runtime), runtime, head)
