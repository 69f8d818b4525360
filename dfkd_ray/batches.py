"""A batch of images, the interface `batch(i)`, the state of a round, and the seeds of batches.

It does not import torch, so that processes that only forward batches start fast and stay small.
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

    `images` is (batch, channels, height, width) in the storage type, `labels` int64 (batch,), -1 without a label.
    `terms` are measurements: unweighted losses, teacher confidence, class histogram, seconds. `contribution` is the
    batch's summand of the next round's state, by name; empty for a stationary method. All arrays are read-only views,
    because trials share batches: writing into one raises `ValueError`.
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
    """The state that the batches of one round depend on, in addition to teacher, config and index.

    `arrays` belong to the method. `student` is the state dict of the student that the round uses, or None. Round 0
    never uses a student.
    """

    number: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    student: Mapping[str, np.ndarray] | None = None

    def __post_init__(self):
        # Arithmetic on 0-dimensional arrays gives numpy scalars.
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
    """The sum of batches' contributions by name, added in the given order, so that the bytes are reproducible."""
    total: dict[str, np.ndarray] = {}
    for one in contributions:
        for name, array in one.items():
            # The sum of two 0-dimensional arrays is a numpy scalar.
            total[name] = np.asarray(total[name] + array) if name in total else np.array(array)
    return total


# The common interface of synthesis methods, cache and streams: batch i, independent of earlier calls.
BatchSource = Callable[[int], Batch]


def mix_seed(*parts: int) -> int:
    """A 63-bit seed from several numbers (splitmix64 over the parts); neighbouring numbers do not collide."""
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
