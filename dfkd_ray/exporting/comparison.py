"""Runs a written file on images, and decides whether it computes what its network computes.

A float32 file must: what differs is the order of summation. An int8 file need not: how much it differs is a property of
the network, which the result states. Only a file that answers differently on every tenth image is refused: it is of no
use, or the runtime computes it wrongly. Between them, weights of float16 are off by at most 1/2048 each.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dfkd_ray import evaluation
from dfkd_ray.batches import Batch
from dfkd_ray.heads import Head

Run = Callable[[np.ndarray], np.ndarray]  # normalised float32 images (n, *input_shape) → logits (n, classes)
BATCHES = (1, 7)  # sizes of the batches that a file is run on, in turn: its batch size must be free
AGREEMENT = {"float32": 0.999, "float16": 0.97, "int8": 0.9}  # the least
AIM_INT8 = 0.99  # below it the result has a warning
# The largest difference of a file's logits: a share of their standard deviation, and of their largest value.
OF_SPREAD, OF_LARGEST = {"float32": 1e-3, "float16": 0.05}, 1e-5


@dataclass(frozen=True)
class Comparison:
    """A file's logits against the network's on the same images.

    `largest_difference` and `spread`, the standard deviation of the network's logits, are in units of logits, `kl` is
    KL(network || file) in nats, `agreement` the share of equal answers in [0, 1].
    """

    num_images: int
    largest_difference: float
    spread: float
    agreement: float
    kl: float


def compared(run: Run, images: np.ndarray, expected: np.ndarray, head: Head, precision: str | None) -> Comparison:
    """Run a file and compare it, by the bounds of its precision: float32, float16, int8; None: only finite logits.

    `FloatingPointError` if it does not compute what the network computes.
    """
    found = in_batches(run, images)
    if found.shape != expected.shape:
        raise FloatingPointError(
            f"the written file gives outputs of shape {found.shape}, the network {expected.shape}; it was not kept"
        )
    own, other = torch.from_numpy(expected), torch.from_numpy(found)
    largest = float(np.abs(found - expected).max())
    spread, agreement = float(expected.std()), head.agreement(other, own)
    bound, least = math.inf, AGREEMENT.get(precision or "", 0.0)
    if precision in OF_SPREAD:
        bound = OF_SPREAD[precision] * spread + OF_LARGEST * float(np.abs(expected).max())
    # `not <=`: a difference that is not a number is a mismatch too.
    if not np.isfinite(found).all() or agreement < least or not largest <= bound:
        limit = "" if math.isinf(bound) else f" and a difference of at most {bound:.2g}"
        raise FloatingPointError(
            f"the written file is not the network: on {len(images)} images it agrees on {100 * agreement:.1f} %, and "
            f"its logits differ by up to {largest:.2g}; expected {100 * least:g} %{limit}; it was not kept"
        )
    return Comparison(len(images), largest, spread, agreement, max(0.0, float(head.kl(other, own, 1.0))))


def in_batches(run: Run, images: np.ndarray, sizes: Sequence[int] = BATCHES) -> np.ndarray:
    """Float32 logits of all images, each run once, in batches of these sizes in turn."""
    parts, start, turn = [], 0, 0
    while start < len(images):
        size = sizes[turn % len(sizes)]
        parts.append(np.asarray(run(images[start : start + size]), np.float32))
        start, turn = start + size, turn + 1
    return np.concatenate(parts)


def accuracy(run: Run, test: Iterable[tuple[Batch, np.ndarray]], head: Head) -> float:
    """Accuracy of a file in [0, 1] on test batches with their normalised images; labels have been checked."""
    hits = total = 0
    for batch, images in test:
        logits = in_batches(run, images, (evaluation.EVALUATION_BATCH // 5,))
        right = head.agrees(torch.from_numpy(logits), torch.from_numpy(np.array(batch.labels)))
        hits, total = hits + int(right.sum()), total + right.numel()
    return hits / total
