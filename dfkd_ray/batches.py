"""A batch of images, the seam `batch(i)`, the state of a round, and the seeds behind them.

Without torch: processes that only pass batches on start faster and stay small without it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

NO_LABEL = -1


@dataclass(frozen=True)
class Batch:
    """Images of one synthesis index, as stored.

    `images` is (batch, channels, height, width) in the storage type, `labels` int64 (batch,), -1 without a label;
    `terms` are what its making measured: unweighted losses, teacher confidence, class histogram, seconds.
    `contribution` is what it adds to the state of the next round, by name; empty for a stationary method.
    All arrays are read-only views: batches are shared between trials, a write into one raises `ValueError`.
    """

    index: int
    images: np.ndarray
    labels: np.ndarray
    key: str
    terms: dict[str, Any] = field(default_factory=dict)
    contribution: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("images", "labels"):
            object.__setattr__(self, name, read_only(getattr(self, name)))
        object.__setattr__(self, "contribution", {k: read_only(v) for k, v in self.contribution.items()})


@dataclass(frozen=True)
class RoundState:
    """What the batches of one round depend on beside teacher, config and index.

    `arrays` are the method's own; `student` is the state dict of the student that the round looks at, None where it
    looks at none. Round 0 of every method has seen no student.
    """

    number: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    student: Mapping[str, np.ndarray] | None = None

    def __post_init__(self):
        # Arithmetic on arrays of no dimension gives numbers.
        object.__setattr__(self, "arrays", {name: np.asarray(array) for name, array in self.arrays.items()})

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the number and all arrays: their names, types, shapes and bytes."""
        sha = hashlib.sha256(f"{self.number} {self.student is not None}".encode())
        for part in (self.arrays, self.student or {}):
            for name in sorted(part):
                array = np.ascontiguousarray(part[name])
                sha.update(json.dumps([name, str(array.dtype), list(np.shape(part[name]))]).encode())
                sha.update(array.reshape(-1).view(np.uint8).data)
        return sha.hexdigest()


def read_only(array: Any) -> np.ndarray:
    """A view that cannot be written to."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def summed(contributions: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum of what batches contribute, by name, added up in the order given: the same bytes wherever it is done."""
    total: dict[str, np.ndarray] = {}
    for one in contributions:
        for name, array in one.items():
            # The sum of two arrays of no dimension is a number.
            total[name] = np.asarray(total[name] + array) if name in total else np.array(array)
    return total


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
