"""What makes batches: a plain class, wrapped in an actor where the fleet starts it.

torch is imported inside, so that the coordinator, which only starts these actors, stays small without it.
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
    """A key that this process was not told of: it has been restarted since."""


@dataclass(frozen=True)
class Spec:
    """What a synthesis key stands for: all that is needed to make its batches.

    `teacher` is what `bundles.to_arrays` gives, or a list with a reference to it: one copy per node, read-only.
    """

    key: str
    config: Mapping[str, Any]
    domain: str
    teacher_hash: str
    teacher_name: str
    teacher: Any
    state: Any = None
    """Of a method that goes by rounds: a list with a `RoundState`, or with a reference to one."""
    student: Mapping[str, Any] | None = None
    """What network the student in the state is: a `StudentConfig` as plain data."""
    owner: str = ""
    """The trial whose student the round looks at: nobody else can use its batches, and no cache keeps them."""
    number: int = 0
    """Of the round."""
    code: str | None = None
    """Where the student's code lies, if it is named by an import path: `models.code_folder`."""

    def folder(self, cache_root: str | None, numerics: str) -> Folder | None:
        """Where its batches are kept; None where none are."""
        return None if cache_root is None or self.owner else cache.folder_of(cache_root, self.key, numerics)


class Synthesizer:
    """Makes `batch(key, index)` for any key that was opened; each batch is in the cache before it is returned.

    Batches that one trial alone can use are in no cache.
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
        """Who this is; answers when it is ready for work."""
        return {"numerics": self.numerics, **whereabouts()}

    def open(self, spec: Spec) -> None:
        """Say what a key stands for; nothing is loaded before its first batch. A trial's rounds before that one go."""
        for key in [key for key, other in self.specs.items() if is_over(other, spec)]:
            del self.specs[key]
            self.sources.pop(key, None)
        self.specs[spec.key] = spec

    def batch(self, key: str, index: int) -> tuple[Batch, dict[str, Any]]:
        """Batch `index` of `key`, from the cache or made; and what the coordinator wants to know of it.

        `FloatingPointError` where the loss stays not finite, `ValueError` for a teacher that does not fit, `NotOpened`.
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
        """The source of a key; the last few stay loaded."""
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
    """Whether a round is not wanted any more once a trial asks for another."""
    return bool(spec.owner) and spec.owner == other.owner and spec.number < other.number


def whereabouts() -> dict[str, Any]:
    """Host, process, and Ray's id of the node (empty outside Ray)."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "node": node}


def note(folder: Folder, spec: Spec, numerics: str) -> None:
    """Write down in the cache what a key's folder holds, or that it is used once more."""
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
    """What the coordinator is told of a batch, without its images."""
    size = batch.images.nbytes + batch.labels.nbytes
    return {"found": found, "wall_s": wall_s, "size_bytes": size, "num_images": len(batch.labels)}


def read_shard(cache_root: str, key: str, numerics: str, index: int) -> tuple[Batch | None, dict[str, Any] | None]:
    """A batch from the cache, on the node that asks for it; (None, None) where it is missing or damaged."""
    start = time.perf_counter()
    batch = cache.read(cache.folder_of(cache_root, key, numerics), index, key)
    return (None, None) if batch is None else (batch, told(batch, True, time.perf_counter() - start))
