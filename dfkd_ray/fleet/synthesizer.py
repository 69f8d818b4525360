"""The synthesizer: makes image batches from a `Spec`; the fleet runs it as Ray actors. Also the cache-reading task.

torch is imported inside its methods, so that the coordinator, which only starts the actors, stays small.
"""

import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dfkd_ray import cache
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.storage import Folder

HELD_SOURCES = 4  # each holds a copy of its teacher on the device


class NotOpened(KeyError):
    """The key was not opened in this process, for example because the actor has been restarted."""


@dataclass(frozen=True)
class Spec:
    """Everything that is needed to make the batches of a synthesis key.

    `teacher` is the result of `bundles.to_arrays`, or a list with a reference to it: one read-only copy per node.
    """

    key: str
    config: Mapping[str, Any]
    domain: str
    teacher_hash: str
    teacher_name: str
    teacher: Any
    state: Any = None
    """For methods in rounds: a list with a `RoundState`, or with a reference to one."""
    student: Mapping[str, Any] | None = None
    """The config (`StudentConfig` as plain data) of the network whose weights the state holds."""
    owner: str = ""
    """The trial whose student the round uses. No other trial can use its batches, so they are not cached."""
    number: int = 0
    """The number of the round."""
    code: str | None = None
    """The folder of the student's code if its architecture is an import path (`models.code_folder`)."""

    def folder(self, cache_root: str | None, numerics: str) -> Folder | None:
        """The cache folder of its batches; None if they are not cached."""
        return None if cache_root is None or self.owner else cache.folder_of(cache_root, self.key, numerics)


class Synthesizer:
    """Makes `batch(key, index)` for every opened key. Each batch is written to the cache before it is returned.

    Batches that only one trial can use are not cached.
    """

    def __init__(self, cache_root: str | None, device: str, fetch: Callable[[Any], Any] = lambda given: given):
        from dfkd_ray import devices

        self.cache_root = cache_root
        self.device = devices.resolve(device)
        self.numerics = devices.numerics_class(self.device)
        self.fetch = fetch
        self.specs: dict[str, Spec] = {}
        self.noted: set[str] = set()
        self.sources: OrderedDict[str, BatchSource] = OrderedDict()

    def hello(self) -> dict[str, Any]:
        """Numerics class, host, process id and node; answers as soon as the actor is ready."""
        return {"numerics": self.numerics, **whereabouts()}

    def open(self, spec: Spec) -> None:
        """Register a key; nothing is loaded before its first batch. Earlier rounds of the same trial are forgotten."""
        for key in [key for key, other in self.specs.items() if is_over(other, spec)]:
            del self.specs[key]
            self.sources.pop(key, None)
        self.specs[spec.key] = spec

    def batch(self, key: str, index: int) -> tuple[Batch, dict[str, Any]]:
        """Batch `index` of `key`, read from the cache or made, and its metadata for the coordinator (`told`).

        `FloatingPointError` if the loss is not finite in every attempt, `ValueError` if the teacher does not fit the
        config, `NotOpened` for an unknown key.
        """
        if key not in self.specs:
            raise NotOpened(key)
        spec, start = self.specs[key], time.perf_counter()
        folder = spec.folder(self.cache_root, self.numerics)
        if folder and key not in self.noted:
            note(folder, spec, self.numerics)
            self.noted.add(key)
        # Another sweep may have written it since the coordinator looked.
        batch = cache.read(folder, index, key) if folder else None
        found = batch is not None
        if batch is None:
            batch = self.source(spec)(index)
            if folder:
                cache.write(folder, batch)
        return batch, told(batch, found, time.perf_counter() - start)

    def source(self, spec: Spec) -> BatchSource:
        """The source of a key; the last `HELD_SOURCES` used stay loaded."""
        from dfkd_ray import bundles, models, synthesis
        from dfkd_ray.config import StudentConfig, parse_synthesis

        if spec.key not in self.sources:
            while len(self.sources) >= HELD_SOURCES:
                self.sources.popitem(last=False)
            teacher = bundles.from_arrays(self.fetch(spec.teacher))
            state = None if spec.state is None else self.fetch(spec.state)
            student = None if spec.student is None else StudentConfig.model_validate(spec.student)
            config = parse_synthesis(spec.config)
            with models.code_from(spec.code):
                key, make = synthesis.source(teacher, config, self.device, spec.domain, state, student)
            assert key == spec.key, f"key {spec.key} was opened with what gives {key}"
            self.sources[spec.key] = make
        self.sources.move_to_end(spec.key)
        return self.sources[spec.key]


def is_over(spec: Spec, other: Spec) -> bool:
    """Whether `spec` is an earlier round of the trial that asks for `other`."""
    return bool(spec.owner) and spec.owner == other.owner and spec.number < other.number


def whereabouts() -> dict[str, Any]:
    """Host, process id, and Ray's node id (empty outside Ray)."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "node": node}


def note(folder: Folder, spec: Spec, numerics: str) -> None:
    """Write the manifest of a key's cache folder, or mark the folder as used again."""
    cache.write_manifest(
        folder,
        key=spec.key,
        numerics=numerics,
        teacher_hash=spec.teacher_hash,
        teacher=spec.teacher_name,
        domain=spec.domain,
        config=dict(spec.config),
    )


def told(batch: Batch, found: bool, wall_s: float) -> dict[str, Any]:
    """Metadata of a batch for the coordinator, without its images."""
    size = batch.images.nbytes + batch.labels.nbytes
    return {"found": found, "wall_s": wall_s, "size_bytes": size, "num_images": len(batch.labels)}


def read_shard(cache_root: str, key: str, numerics: str, index: int) -> tuple[Batch | None, dict[str, Any] | None]:
    """Read a batch from the cache on the reader's node; (None, None) if it is missing or damaged."""
    start = time.perf_counter()
    batch = cache.read(cache.folder_of(cache_root, key, numerics), index, key)
    return (None, None) if batch is None else (batch, told(batch, True, time.perf_counter() - start))
