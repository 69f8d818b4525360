"""A batch of images, the seam `batch(i)`, and the seeds behind it.

Without torch: processes that only pass batches on start faster and stay small without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NO_LABEL = -1


@dataclass(frozen=True)
class Batch:
    """Images of one synthesis index, as stored.

    `images` is (batch, channels, height, width) in the storage type, `labels` int64 (batch,), -1 without a label;
    `terms` are what its making measured: unweighted losses, teacher confidence, class histogram, seconds.
    Both arrays are read-only views: batches are shared between trials, a write into one raises `ValueError`.
    """

    index: int
    images: np.ndarray
    labels: np.ndarray
    key: str
    terms: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("images", "labels"):
            view = np.asarray(getattr(self, name)).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)


# The seam of every synthesis method, of the cache and of what streams them: batch i, whatever came before.
BatchSource = Callable[[int], Batch]


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers, without collisions of neighbours (splitmix64 over the parts)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def batch_seed(key: str, index: int) -> int:
    """The seed of batch `index` of a synthesis key (hex digest)."""
    return mix_seed(int(key[:16], 16), index)
