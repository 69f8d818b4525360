"""The coordinator: one Ray actor per sweep that readers ask for batches, and that assigns batches to synthesizers.

No images pass through it, only references. A batch is in the cache before its reference is given to a reader. Its
images stay in the object store of the node that made them until a reader fetches them, once per node. The coordinator's
state can be lost: if it dies, Ray restarts it with the same arguments, it starts its synthesizers again (`pool.py`),
and it finds the finished batches in the cache.
"""

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dfkd_ray import cache
from dfkd_ray.fleet.metrics import Metrics
from dfkd_ray.fleet.pool import Lost, Pool, Worker, error_text
from dfkd_ray.fleet.schedule import Key, Schedule
from dfkd_ray.fleet.settings import Settings
from dfkd_ray.fleet.synthesizer import NotOpened, Spec, is_over, note, read_shard

MAX_READS = 8  # shards read from the cache at a time
MAX_DEATHS = 20  # synthesizers that may die over one batch before it is called impossible
MAX_TIMEOUTS = 3  # the same for synthesizers that hang over it
MAX_DISK_ERRORS = 3  # the same for errors of the disk or the store, some of which pass
HOLD_S = 10.0
TICK_S = 2.0
log = logging.getLogger(__name__)


class Coordinator:
    """See the module docstring. All methods run on one event loop; no state is shared between threads."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.schedule = Schedule(settings.budget_bytes)
        self.specs: dict[str, Spec] = {}
        self.opening: dict[str, asyncio.Task] = {}
        self.stale: set[str] = set()  # keys whose state is lost: whoever wants them next brings it again
        self.closing: set[str] = set()  # keys that go as soon as nothing of them is being made
        self.arrived: dict[tuple[str, int], list[asyncio.Future]] = {}
        self.deaths: Counter[tuple[str, int]] = Counter()
        self.timeouts: Counter[tuple[str, int]] = Counter()
        self.disk_errors: Counter[tuple[str, int]] = Counter()
        self.readers: dict[tuple[str, int], str] = {}  # batch → node of the last reader that waits for it
        self.num_reading = 0
        self.to_read: list[tuple[str, int, str]] = []
        self.start = time.monotonic()
        self.counts = dict.fromkeys(("made", "images", "read", "found", "deaths", "damaged"), 0)
        self.background: set[asyncio.Task] = set()
        self.shard_reader: Any = ray.remote(read_shard)
        self.metrics = Metrics()
        self.pool = Pool(settings, self.spawn, on_up=self.pump)
        self.spawn(self.tick())

    # ---- what readers call -------------------------------------------------------------------------------------

    async def ready(self) -> dict[str, Any]:
        """Wait until one synthesizer is up, or none can start; returns the status (`numerics` is then None)."""
        waits = [self.spawn(event.wait()) for event in (self.pool.numerics_known, self.pool.none_can_start)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return self.status()

    async def open(self, spec: Spec, numerics: str) -> dict[str, Any]:
        """Register a key and list its batches in the cache, once. `numerics`: the numerics class of the sweep's start.

        The reply has `waiting_for`, `alone_s` and `held_s`, as that of `take`.
        """
        start = time.monotonic()
        self.pool.settle(numerics)
        if spec.state is not None and spec.key in self.specs:  # who opens it again brings a state that is not lost
            self.specs[spec.key] = spec
            self.stale.discard(spec.key)
            self.pool.reopen(spec.key)
        if spec.key not in self.specs:
            if spec.key not in self.opening:
                self.opening[spec.key] = self.spawn(self._open(spec))
            await asyncio.wait([self.opening[spec.key]], timeout=HOLD_S)
        for key in [key for key, other in self.specs.items() if is_over(other, spec)]:
            self.drop(key)
        return self.where(spec.key, 0) | {"held_s": time.monotonic() - start}

    async def _open(self, spec: Spec) -> None:
        numerics, state = await self.pool.settled(), Key()
        folder = spec.folder(self.settings.cache_root, numerics)
        if folder is not None:
            try:
                state.cached = await asyncio.to_thread(cache.indices, folder)
                await asyncio.to_thread(note, folder, spec, numerics)
            except OSError as error:  # who makes its batches meets that too, and what comes of it reaches the readers
                log.warning("key %s: %s", spec.key[:12], error_text(error))
        self.schedule.keys[spec.key] = state
        self.specs[spec.key] = spec
        del self.opening[spec.key]

    async def prepare(self, spec: Spec, numerics: str, num_batches: int) -> None:
        """Have the first batches of a key made before a reader asks for them, as far as the window allows."""
        await self.open(spec, numerics)
        if spec.key in self.specs:
            self.schedule.look_ahead(spec.key, 0, num_batches, self.window)
            self.pump()

    async def close(self, owner: str) -> None:
        """Forget the rounds of this trial."""
        for key in [key for key, spec in self.specs.items() if owner and spec.owner == owner]:
            self.drop(key)

    def drop(self, key: str) -> None:
        """Forget a key that is not needed any more, as soon as none of its batches is being made or waited for."""
        if self.schedule.drop(key):
            self.closing.discard(key)
            self.specs.pop(key, None)
        else:
            self.closing.add(key)

    async def take(
        self, key: str, indices: list[int], until: int, node: str, hold_s: float, lost: list[int] | None = None
    ) -> dict[str, Any]:
        """Long poll for batches: returns when at least one of `indices` exists or has failed, or after `hold_s`.

        `until`: the index (exclusive) up to which the reader will read; batches up to it may be made ahead. `lost`:
        indices whose objects the reader could not fetch. The reply has `ready` (index → (ref, whether it was
        found rather than made)) and `errors` (index → reason). If both are empty it has `waiting_for` and `alone_s`
        too. For a key that is not open it has `unknown`.
        """
        start = time.monotonic()
        if key not in self.specs or key in self.stale:
            return {"unknown": True, "held_s": 0.0}
        for index in lost or ():
            self.schedule.forget(key, index)
        reply = self.schedule.collect(key, indices)
        asked = [] if reply["ready"] or reply["errors"] else indices
        if indices:
            self.schedule.look_ahead(key, min(indices) + len(indices), until, self.window)
        # Where something is ready the rest of the window is on its way too, just not waited for.
        for index in set(indices) - set(reply["ready"]) - set(reply["errors"]) - set(asked):
            if self.schedule.wants_reading(key, index):
                self.to_read.append((key, index, node))
            else:
                self.schedule.look_ahead(key, index, index + 1, 1)
        if asked:
            futures = []
            self.schedule.wait(key, until)
            for index in asked:
                self.schedule.ask(key, index)
                self.readers[key, index] = node
                if self.schedule.wants_reading(key, index):
                    self.to_read.append((key, index, node))
                future = asyncio.get_running_loop().create_future()
                self.arrived.setdefault((key, index), []).append(future)
                futures.append(future)
            self.pump()
            await asyncio.wait(futures, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
            self.schedule.stop_waiting(key, until)
            for index, future in zip(asked, futures, strict=True):
                self.schedule.stop_asking(key, index)
                if not future.done():
                    future.cancel()
                    waiting = self.arrived[key, index]
                    waiting.remove(future)
                    if not waiting:
                        del self.arrived[key, index]
                        self.readers.pop((key, index), None)
            reply = self.schedule.collect(key, indices)
        else:
            self.pump()
        if not reply["ready"] and not reply["errors"]:
            reply |= self.where(key, min(indices))
        reply["held_s"] = time.monotonic() - start
        return reply

    def status(self) -> dict[str, Any]:
        """Counts since this coordinator started, and the state of queue and synthesizers."""
        seconds = time.monotonic() - self.start
        return {
            **self.counts,
            "synthesizers": len(self.pool.members),
            "synthesizers_up": self.pool.num_up,
            "queue_depth": self.schedule.queue_depth,
            "in_flight": sum(len(state.in_flight) for state in self.schedule.keys.values()),
            "held_bytes": self.schedule.held_bytes,
            "images_per_s": self.counts["images"] / seconds,
            "idle": self.pool.idle_shares(),
            "keys": len(self.specs),
            "numerics": self.pool.numerics,
            "trouble": self.pool.trouble,
            "seconds": seconds,
            # Of this process, all threads: one near a core is the fleet's limit.
            "cpu_s": time.process_time(),
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def actors(self) -> list[Any]:
        """The synthesizers' handles, for tests that kill them."""
        return [worker.actor for worker in self.pool.members]

    def where(self, key: str, index: int) -> dict[str, Any]:
        """The reply to a reader that must wait: what it waits for, and for how long no synthesizer has been up."""
        if (key, index) in self.pool.making:
            name, begun = self.pool.making[key, index]
            words = f"{name} has been making it for {time.monotonic() - begun:.0f} s"
        elif not self.pool.num_up:
            troubles = "; ".join(f"{name}: {trouble}" for name, trouble in list(self.pool.trouble.items())[:3])
            need = f"{self.settings.cpus:g} CPUs and {self.settings.gpus:g} GPUs"
            words = f"a synthesizer to start ({need} each; {troubles})"
        else:
            words = f"a free synthesizer: {self.pool.num_up} up, {self.schedule.queue_depth} batches queued"
        return {"waiting_for": words, "alone_s": self.pool.alone_s}

    # ---- what becomes of a batch -------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """The largest number of batches made ahead of a reader."""
        return max(self.settings.window, 2 * self.settings.slots * len(self.pool.members))

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Start a background task and keep a reference to it: the event loop holds only a weak one."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    def pump(self) -> None:
        """Assign a batch to every free slot, and start reading shards from the cache, up to `MAX_READS` at a time.

        A batch is made on the node of its last waiting reader if a synthesizer there is free: this saves a transfer.
        """
        while self.pool.first_free() and (job := self.schedule.next_to_make()):
            self.spawn(self.make_batch(self.pool.take_slot(near=self.readers.get(job, "")), *job))
        while self.to_read and self.num_reading < MAX_READS:
            self.num_reading += 1
            self.spawn(self.read_batch(*self.to_read.pop(0)))

    async def make_batch(self, worker: Worker, key: str, index: int) -> None:
        """Have one batch made, and record the result: the batch, a retry, or an error."""
        try:
            ref, info = await self.pool.make(worker, self.specs[key], index)
        except RayTaskError as error:
            self.failed(key, index, error)
        except Lost as error:
            self.lost(key, index, error)
        else:
            found = info["found"]
            in_cache = self.specs[key].folder(self.settings.cache_root, str(self.pool.numerics)) is not None
            self.schedule.hold(key, index, ref, info["size_bytes"], cached=in_cache, fresh=not found)
            self.counts["found" if found else "made"] += 1
            if not found:
                self.counts["images"] += info["num_images"]
                self.metrics.images.inc(info["num_images"])
        self.tell(key, index)
        if key in self.closing:
            self.drop(key)

    def failed(self, key: str, index: int, error: RayTaskError) -> None:
        """Handle an exception of making a batch: retry if it may pass, else record it as the batch's error."""
        if isinstance(error.cause, ObjectLostError) and self.specs[key].state is not None:
            self.stale.add(key)  # the trial that had put the state there is gone
        elif isinstance(error.cause, OSError) and self.disk_errors[key, index] + 1 < MAX_DISK_ERRORS:
            self.disk_errors[key, index] += 1
            log.warning("batch %d of %s: %s; trying again", index, key[:12], error_text(error))
        elif not isinstance(error.cause, NotOpened):
            self.schedule.fail(key, index, error_text(error))
            return
        self.schedule.not_there(key, index)

    def lost(self, key: str, index: int, error: Lost) -> None:
        """Handle the loss of the synthesizer that was making a batch: retry, unless the batch has cost too many."""
        self.counts["deaths"] += 1
        self.deaths[key, index] += 1
        self.timeouts[key, index] += error.hung
        if self.deaths[key, index] >= MAX_DEATHS:
            self.schedule.fail(key, index, f"RuntimeError: {MAX_DEATHS} synthesizers died making it; last: {error}")
        elif self.timeouts[key, index] >= MAX_TIMEOUTS:
            self.schedule.fail(key, index, f"TimeoutError: {error}, {MAX_TIMEOUTS} times; raise `batch_timeout`")
        else:
            self.schedule.not_there(key, index)

    async def read_batch(self, key: str, index: int, node: str) -> None:
        """Read a shard from the cache into the object store of the reader's node."""
        ref = info = None
        try:
            near = NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT"
            reader = self.shard_reader.options(num_cpus=0, num_returns=2, scheduling_strategy=near)
            ref, info_ref = reader.remote(self.settings.cache_root, key, self.pool.numerics, index)
            info = await asyncio.wait_for(asyncio.wrap_future(info_ref.future()), self.settings.batch_timeout_s)
        except (RayError, TimeoutError) as error:
            log.warning("reading batch %d of %s from the cache: %s", index, key[:12], error_text(error))
        if info is None:
            self.counts["damaged"] += 1
            self.schedule.not_there(key, index)
        else:
            self.schedule.hold(key, index, ref, info["size_bytes"], cached=True, fresh=False)
            self.counts["read"] += 1
            self.metrics.found.inc()
        self.num_reading -= 1
        self.tell(key, index)

    def tell(self, key: str, index: int) -> None:
        """Wake the readers that wait for this batch if it is ready or has failed; then assign further work."""
        if self.schedule.ref(key, index) is not None or index in self.schedule.keys[key].errors:
            self.readers.pop((key, index), None)
            for future in self.arrived.pop((key, index), ()):
                if not future.done():
                    future.set_result(None)
        self.pump()

    async def tick(self) -> None:
        """Every `TICK_S` seconds: update the metrics, and add or remove synthesizers."""
        while True:
            await asyncio.sleep(TICK_S)
            self.metrics.show(self.status())
            most = await self.pool.most()
            self.let_go(self.pool.resize(self.schedule.demand, most))

    def let_go(self, made: list[tuple[str, int]]) -> None:
        """Drop the references to batches that removed synthesizers made, if the cache has these batches.

        Ray does not count a machine as idle while objects on it are referenced.
        """
        for key, index in made if self.settings.cache_root else ():
            self.schedule.forget(key, index)
