"""Who makes images, and how a reader takes them: rounds, their makers, and their batches gathered into one array.

A `Round` is everything that determines its batches; `Images` is the interface of makers. `Local` makes batches in this
process, `Injected` hands out those of somebody else; the fleet has a third.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from dfkd_ray import cache, devices, synthesis
from dfkd_ray.batches import Batch, BatchSource, RoundState, summed
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import StudentConfig, versions
from dfkd_ray.distillation import Pool, Progress
from dfkd_ray.storage import Where


@dataclass(frozen=True)
class Round:
    """Everything that determines the batches of one round. `owner`: the trial whose student it uses, "" if none."""

    teacher: Teacher
    config: Any
    device: torch.device
    domain: str = "train"
    state: RoundState | None = None
    student: StudentConfig | None = None
    owner: str = ""

    @cached_property
    def key(self) -> str:
        """The synthesis key: equal keys, equal batches."""
        return synthesis.key_of(self.teacher, self.config, self.domain, self.state, self.student)

    def source(self) -> BatchSource:
        """A source that makes the round's batches in this process."""
        return synthesis.source(self.teacher, self.config, self.device, self.domain, self.state, self.student)[1]


@runtime_checkable
class Images(Protocol):
    """The interface of objects that provide the batches of rounds."""

    def read(self, wanted: Round, indices: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
        """Yields (batch, found): each batch once, in any order; `found` is False if it was made for this reader."""
        ...

    def prepare(self, wanted: Round, num_batches: int) -> None:
        """Announce that the first batches of a round will be needed soon."""
        ...

    def close(self, owner: str) -> None:
        """Announce that a trial has ended: the rounds that it owns are not needed any more."""
        ...


class Local:
    """Makes batches in this process, through the cache in `cache_root` (a folder or URI) unless that is None.

    Rounds that use a trial's own student are not cached: no other trial could use them.
    """

    def __init__(self, cache_root: Where | None = None):
        self.cache_root = cache_root

    def read(self, wanted: Round, indices: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
        """As of `Images`."""
        folder = None
        if self.cache_root is not None and not wanted.owner:
            numerics = devices.numerics_class(wanted.device)
            folder = cache.folder_of(self.cache_root, wanted.key, numerics)
            cache.write_manifest(
                folder,
                key=wanted.key,
                numerics=numerics,
                teacher_hash=wanted.teacher.hash,
                teacher=wanted.teacher.name,
                domain=wanted.domain,
                config=wanted.config.model_dump(mode="json"),
            )
        yield from cache.fetched(indices, wanted.key, wanted.source(), folder)

    def prepare(self, wanted: Round, num_batches: int) -> None:
        """Does nothing: this process is busy with training."""

    def close(self, owner: str) -> None:
        """Nothing is kept."""


class Injected:
    """Batches from outside, such as real images."""

    def __init__(self, source: BatchSource):
        self.source = source

    def read(self, wanted: Round, indices: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
        """As of `Images`."""
        return ((self.source(index), False) for index in indices)

    def prepare(self, wanted: Round, num_batches: int) -> None:
        """Does nothing: the batches exist."""

    def close(self, owner: str) -> None:
        """Nothing is kept."""


@dataclass
class Gathered:
    """The first `num_batches` batches of a round, in one array each for images and labels."""

    num_batches: int
    config: Any
    domain: str
    number: int = 0
    key: str = ""
    pool: Pool = field(default_factory=lambda: Pool(np.empty(0), np.empty(0)))
    rows: list[dict[str, Any]] = field(default_factory=list)
    contributions: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    total: dict[str, np.ndarray] = field(default_factory=dict)
    """The sum of the batches' contributions to the next round's state, in the order of their indices."""
    num_found: int = 0

    def add(self, batch: Batch, found: bool) -> None:
        """Copy a batch to its place, so that no memory shared between trials is held during training."""
        size, full_size = len(batch.labels), self.config.batch_size
        if not self.rows:
            shape = (self.num_batches * full_size, *batch.images.shape[1:])
            self.pool = Pool(np.empty(shape, batch.images.dtype), np.empty(shape[0], np.int64))
        place = slice(batch.index * full_size, batch.index * full_size + size)
        self.pool.images[place], self.pool.labels[place] = batch.images, batch.labels
        self.contributions[batch.index] = {name: np.array(array) for name, array in batch.contribution.items()}
        terms = {**batch.terms, "class_histogram": json.dumps(batch.terms.get("class_histogram"))}
        what = {"domain": self.domain, "method": self.config.method, "num_images": size, "round": self.number}
        what |= {"batch_index": self.number * self.num_batches + batch.index, "images_sha256": batch_sha256(batch)}
        what |= {"synthesis_version": versions()["synthesis_version"], "synthesis_key": batch.key}
        self.rows.append({**terms, **what})
        self.num_found += found
        self.key = batch.key


def mean_term(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """A term's mean over batches; None if no batch has it."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def wall_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """The seconds that making these batches took, including batches made elsewhere or earlier."""
    return sum(float(row.get("wall_s") or 0.0) for row in rows)


def batch_sha256(batch: Batch) -> str:
    """SHA-256 of a batch's images as stored."""
    return hashlib.sha256(np.ascontiguousarray(batch.images).data.cast("B")).hexdigest()


def gather(source: Images, wanted: Round, num_batches: int, stage: str, report: Progress) -> Gathered:
    """The first batches of a round, with progress."""
    number = wanted.state.number if wanted.state else 0
    gathered = Gathered(num_batches, wanted.config, wanted.domain, number)
    report(stage, 0, num_batches, {})
    for batch, found in source.read(wanted, range(num_batches)):
        gathered.add(batch, found)
        shown = {name: value for name, value in batch.terms.items() if isinstance(value, float)}
        report(stage, len(gathered.rows), num_batches, {**shown, "cached": gathered.num_found})
    total = sum(row["num_images"] for row in gathered.rows)  # the last batch of real images may be smaller
    gathered.pool = Pool(gathered.pool.images[:total], gathered.pool.labels[:total])
    gathered.total = summed([gathered.contributions[index] for index in sorted(gathered.contributions)])
    gathered.contributions.clear()
    for row in gathered.rows:
        row["teacher_hash"] = wanted.teacher.hash
    gathered.rows.sort(key=lambda row: row["batch_index"])
    return gathered
