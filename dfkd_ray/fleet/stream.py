"""The client of the fleet: through it a trial reads batches by index, with prefetching and a deadline on every wait."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from dfkd_ray import cache, devices, models
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.fleet.coordinator import HOLD_S
from dfkd_ray.fleet.synthesizer import Spec
from dfkd_ray.image_sources import Round

PAUSE_S = 0.2
ANSWER_S = 60.0  # timeout of a call; the coordinator answers within HOLD_S, with or without a batch
FETCH_S = 300.0  # timeout of fetching a batch that exists; then it is requested again


class Stream:
    """Implements `trial.Images`: reads the batches of any round through the coordinator.

    `teachers` maps a teacher's hash to a list with a reference to its `bundles.to_arrays`. `call_s` counts the seconds
    of overhead in Ray calls, `wait_s` the seconds of waiting for images that are still being made.
    """

    def __init__(
        self,
        coordinator: Any,
        teachers: Mapping[str, list[Any]],
        cache_root: str | None,
        numerics: str,
        *,
        in_flight: int = 4,
        timeout_s: float = 3600.0,
        alone_s: float = 60.0,
    ):
        self.coordinator, self.teachers, self.cache_root = coordinator, teachers, cache_root
        self.numerics = numerics
        self.in_flight, self.timeout_s, self.alone_s = in_flight, timeout_s, alone_s
        self.node = ray.get_runtime_context().get_node_id()
        self.call_s = self.wait_s = 0.0
        self.num_alone = 0
        self.specs: dict[str, Spec] = {}  # of rounds with a state; each refers to it in the object store

    def read(self, wanted: Round, indices: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
        """As `trial.Images.read`, in the order of `indices`."""
        spec = self.spec(wanted)
        return self.batches(spec, indices, self.made_here(spec, wanted))

    def prepare(self, wanted: Round, num_batches: int) -> None:
        """Have the first batches of a round made ahead; does not block."""
        self.coordinator.prepare.remote(self.spec(wanted), self.numerics, num_batches)

    def close(self, owner: str) -> None:
        """Tell the coordinator that this trial's own rounds are not needed any more."""
        if self.specs:
            self.specs.clear()
            self.coordinator.close.remote(owner)

    def spec(self, wanted: Round) -> Spec:
        """The `Spec` of a round. A round's state is put into the object store once."""
        if wanted.key in self.specs:
            return self.specs[wanted.key]
        teacher, state = wanted.teacher, wanted.state
        config, student = wanted.config.model_dump(mode="json"), None
        if state is not None and state.student is not None and wanted.student is not None:
            student = wanted.student.model_dump(mode="json")
        spec = Spec(
            wanted.key,
            config,
            wanted.domain,
            teacher.hash,
            teacher.name,
            self.teachers[teacher.hash],
            state=None if state is None else [ray.put(state)],
            student=student,
            owner=wanted.owner,
            number=0 if state is None else state.number,
            code=models.code_folder() if student and models.module_of(student["architecture"] or "") else None,
        )
        if state is not None:
            self.specs = {key: other for key, other in self.specs.items() if other.number + 1 >= state.number}
            self.specs[wanted.key] = spec
        return spec

    def source(self, wanted: Round) -> BatchSource:
        """Random access by `batch(i)`: the same interface as local synthesis."""
        return lambda index: next(self.read(wanted, [index]))[0]

    def batches(
        self, spec: Spec, indices: Iterable[int], alone: BatchSource | None = None
    ) -> Iterator[tuple[Batch, bool]]:
        """Yields (batch, found) in the order of `indices`; `found` is False if the batch was made for this reader.

        The next `in_flight` batches are requested while the caller works on one. If no synthesizer has been up for
        `alone_s` seconds, `alone` makes the batch in this process, with the same images. `TimeoutError` tells what was
        waited for. A batch that cannot be made raises its error.
        """
        indices = list(indices)
        coming: dict[int, tuple[Any, bool]] = {}  # index → (reference, found): received, perhaps still in transfer
        until = max(indices, default=-1) + 1
        pending: tuple[Any, float] | None = None
        lost: list[int] = []
        progress, waiting_for = time.monotonic(), "the coordinator"
        for position, index in enumerate(indices):
            batch: Batch | None = None
            found = False
            while batch is None:
                if time.monotonic() - progress > self.timeout_s:
                    raise TimeoutError(
                        f"batch {index} of synthesis {spec.key[:12]}: nothing for {self.timeout_s:.0f} s; "
                        f"waiting for {waiting_for}"
                    )
                if index in coming:
                    ref, found = coming.pop(index)
                    try:
                        batch = self.timed(ref, FETCH_S)
                        break
                    except RayError:  # the object's node or owner is gone
                        lost.append(index)
                window = self.window(indices, position, coming)
                reply, lost = self.ask(pending, spec, window, until, lost), []
                pending, waiting_for = None, reply.get("waiting_for", waiting_for)
                if index in reply.get("errors", {}):
                    raise error_of(reply["errors"][index], spec.key, index)
                if reply.get("ready"):
                    coming |= reply["ready"]
                    # Starts the transfers to this node now, not when each batch is needed.
                    ray.wait([ref for ref, _ in coming.values()], num_returns=len(coming), timeout=0)
                elif alone and reply.get("alone_s", 0.0) > self.alone_s:
                    self.num_alone += 1
                    batch = alone(index)
            assert batch is not None
            window = self.window(indices, position + 1, coming)
            if window and pending is None:
                pending = self.send(spec, window, until, [])
            yield batch, found
            progress = time.monotonic()  # the caller's own time does not count

    def window(self, indices: list[int], position: int, coming: Mapping[int, Any]) -> list[int]:
        """The next `in_flight` indices from `position` on, without those already received."""
        return [i for i in dict.fromkeys(indices[position : position + self.in_flight]) if i not in coming]

    def send(self, spec: Spec, window: list[int], until: int, lost: list[int]) -> tuple[Any, float]:
        """Request some indices; returns the reference of the reply, and the time of the request."""
        hold_s = min(HOLD_S, self.timeout_s, max(self.alone_s, PAUSE_S))
        return self.coordinator.take.remote(spec.key, window, until, self.node, hold_s, lost), time.monotonic()

    def ask(
        self, pending: tuple[Any, float] | None, spec: Spec, window: list[int], until: int, lost: list[int]
    ) -> dict[str, Any]:
        """The reply to the pending request, or to a new one; without batches if the coordinator does not answer."""
        start = time.monotonic()
        reply: Any
        try:
            ref, sent = pending if pending and not lost else self.send(spec, window, until, lost)
            reply = ray.get(ref, timeout=ANSWER_S)
            if reply.get("unknown"):
                sent, ref = time.monotonic(), self.coordinator.open.remote(spec, self.numerics)
                reply = ray.get(ref, timeout=ANSWER_S)
        except (RayActorError, GetTimeoutError) as error:
            time.sleep(PAUSE_S)
            reply, sent = {"waiting_for": f"the coordinator to come back ({type(error).__name__})"}, start
        end = time.monotonic()
        blocked = end - start
        overhead = min(blocked, max(0.0, end - sent - reply.get("held_s", blocked)))
        self.call_s += overhead
        self.wait_s += blocked - overhead
        return reply

    def timed(self, ref: Any, timeout_s: float) -> Any:
        """`ray.get`; its seconds are added to `call_s`."""
        start = time.monotonic()
        try:
            return ray.get(ref, timeout=timeout_s)
        finally:
            self.call_s += time.monotonic() - start

    def made_here(self, spec: Spec, wanted: Round) -> BatchSource:
        """A source that makes the batches of `spec` in this process, through the cache."""

        def batch(index: int) -> Batch:
            folder = spec.folder(self.cache_root, self.numerics)
            if devices.numerics_class(wanted.device) != self.numerics:
                raise TimeoutError(f"no synthesizer for {self.alone_s:.0f} s, and this trial computes otherwise")
            return cache.fetch([index], spec.key, wanted.source(), folder)[0]

        return batch


def error_of(reason: str, key: str, index: int) -> Exception:
    """A synthesizer's error text as an exception of the same type."""
    kind, _, message = reason.partition(": ")
    kinds: dict[str, type[Exception]] = {
        "FloatingPointError": FloatingPointError,
        "ValueError": ValueError,
        "MemoryError": MemoryError,
        "OutOfMemoryError": MemoryError,
        "OSError": OSError,
        "TimeoutError": TimeoutError,
    }
    return kinds.get(kind, RuntimeError)(f"batch {index} of synthesis {key[:12]}: {message or reason}")
