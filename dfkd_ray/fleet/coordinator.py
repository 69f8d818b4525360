"""The coordinator: one actor per sweep that owns the fleet and every synthesis key. No images pass through it.

Each synthesizer slot has one batch at a time; what it makes is in the cache before its reference is handed out, and
lies in the object store of the node that made it until a reader fetches it, once per node. Nothing here is the only
copy of anything: a coordinator that dies is restarted by Ray with the same arguments, starts its synthesizers again,
and finds in the cache what was made before.
"""

import asyncio
import heapq
import logging
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dfkd_ray import cache
from dfkd_ray.fleet import growth
from dfkd_ray.fleet.metrics import Metrics
from dfkd_ray.fleet.placement import Node, automatic
from dfkd_ray.fleet.schedule import Key, Schedule
from dfkd_ray.fleet.synthesizer import NotOpened, Spec, Synthesizer, is_over, note, read_shard
from dfkd_ray.storage import in_one_line

MAX_READS = 8  # shards read from the cache at a time
MAX_DEATHS = 20  # synthesizers that may die over one batch before it is called impossible
MAX_TIMEOUTS = 3  # the same for synthesizers that hang over it
MAX_DISK_ERRORS = 3  # the same for errors of the disk or the store, some of which pass
HOLD_S = 10.0
TICK_S = 2.0
QUIET_S = 10.0  # without demand, before synthesizers that are still pending are withdrawn
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a coordinator is started with, and restarted with."""

    num_synthesizers: int
    cpus: float
    gpus: float = 0.0
    cache_root: str | None = None
    device: str = "auto"
    most: int | Literal["auto"] | None = None
    """While batches are waited for synthesizers are added, up to so many in all. "auto": up to as many as there is room
    for on the machines that are alive at the time. None: never."""
    added_cpus: float = 0.0  # that each added one reserves; none with "auto"
    idle_s: float = 60.0  # after which the added ones of a range are removed again
    threads: int = 1  # of one synthesizer: what "auto" divides cores by
    trial_gpus: float = 0.0  # what a trial reserves of a GPU: "auto" leaves room for it
    window: int = 4  # batches ahead of a reader; at least two per slot
    budget_bytes: int = 256 << 20  # of references kept; what is beyond lives in the cache
    batch_timeout_s: float = 3600.0  # a batch that takes longer is taken from its synthesizer
    placement_group: Any = None
    slots: int = 1  # batches that one actor makes at a time
    make: Callable[..., Any] = Synthesizer


@dataclass
class Worker:
    """One synthesizer actor and what it is doing."""

    name: str
    actor: Any
    number: int = 0  # by the order of starting
    up: bool = False
    offered: set[str] = field(default_factory=set)  # the heaps of free slots that it is in
    busy: int = 0
    opened: set[str] = field(default_factory=set)
    busy_s: float = 0.0
    since: float = 0.0
    num_batches: int = 0
    trouble: str = "starting"
    node: str = ""
    free_since: float = 0.0
    in_group: bool = True  # in the fleet's reservation; others were added later
    left_out: bool = False  # it computes otherwise than the fleet
    removed: bool = False
    made: set[tuple[str, int]] = field(default_factory=set)  # by one that was added: what lies on its machine


class Coordinator:
    """See the module. All methods run on one event loop: nothing here is shared between threads."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.schedule = Schedule(settings.budget_bytes)
        self.specs: dict[str, Spec] = {}
        self.opening: dict[str, asyncio.Task] = {}
        self.stale: set[str] = set()  # keys whose state is lost: whoever wants them next brings it again
        self.closing: set[str] = set()  # keys that go as soon as nothing of them is being made
        self.arrived: dict[tuple[str, int], list[asyncio.Future]] = {}
        self.deaths: dict[tuple[str, int], int] = {}
        self.timeouts: dict[tuple[str, int], int] = {}
        self.making: dict[tuple[str, int], tuple[str, float]] = {}
        self.workers: list[Worker] = []
        self.free: dict[
            str, list[tuple[int, int, Worker]]
        ] = {}  # heaps by node and "" for all: who may have a free slot
        self.num_started = 0
        self.readers: dict[tuple[str, int], str] = {}  # batch → node of the last reader that waits for it
        self.last_wanted = time.monotonic()
        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.numerics: str | None = None
        self.disk_errors: dict[tuple[str, int], int] = {}
        self.numerics_known = asyncio.Event()
        self.num_reading = 0
        self.to_read: list[tuple[str, int, str]] = []
        self.last_alive = time.monotonic()
        self.start = time.monotonic()
        self.counts = dict.fromkeys(("made", "images", "read", "found", "deaths", "damaged"), 0)
        self.background: set[asyncio.Task] = set()
        self.shard_reader: Any = ray.remote(read_shard)
        self.metrics = Metrics()
        for _ in range(settings.num_synthesizers):
            self.add_worker(in_group=True)
        self.spawn(self.tick())

    # ---- what readers call -------------------------------------------------------------------------------------

    async def ready(self) -> dict[str, Any]:
        """Answers as soon as one synthesizer is up."""
        await self.numerics_known.wait()
        return self.status()

    async def open(self, spec: Spec, numerics: str) -> dict[str, Any]:
        """Make a key known, and look once what the cache has of it. `numerics` is the class the sweep began with.

        The answer is as of `take`, with `waiting_for` where no synthesizer has come up yet.
        """
        start = time.monotonic()
        if self.restarted and self.numerics is None:
            self.numerics = numerics
            self.numerics_known.set()
        if spec.state is not None and spec.key in self.specs:  # who opens it again brings a state that is not lost
            self.specs[spec.key] = spec
            self.stale.discard(spec.key)
            for worker in self.workers:
                worker.opened.discard(spec.key)
        if spec.key not in self.specs:
            if spec.key not in self.opening:
                self.opening[spec.key] = self.spawn(self._open(spec))
            await asyncio.wait([self.opening[spec.key]], timeout=HOLD_S)
        for key in [key for key, other in self.specs.items() if is_over(other, spec)]:
            self.drop(key)
        return self.where(spec.key, 0) | {"held_s": time.monotonic() - start}

    async def _open(self, spec: Spec) -> None:
        await self.numerics_known.wait()
        state = Key()
        assert self.numerics is not None
        folder = spec.folder(self.settings.cache_root, self.numerics)
        if folder is not None:
            try:
                state.cached = await asyncio.to_thread(cache.indices, folder)
                await asyncio.to_thread(note, folder, spec, self.numerics)
            except OSError as error:  # who makes its batches meets that too, and what comes of it reaches the readers
                log.warning("key %s: %s", spec.key[:12], kind_and_words(error))
        self.schedule.keys[spec.key] = state
        self.specs[spec.key] = spec
        del self.opening[spec.key]

    async def prepare(self, spec: Spec, numerics: str, num_batches: int) -> None:
        """Make the first batches of a key ahead of its reader, as far as the window goes."""
        await self.open(spec, numerics)
        if spec.key in self.specs:
            self.schedule.look_ahead(spec.key, 0, num_batches, self.window)
            self.pump()

    async def close(self, owner: str) -> None:
        """Forget the rounds that are a trial's own."""
        for key in [key for key, spec in self.specs.items() if owner and spec.owner == owner]:
            self.drop(key)

    def drop(self, key: str) -> None:
        """Forget a key that nobody will ask for, as soon as nothing of it is being made or waited for."""
        if self.schedule.drop(key):
            self.closing.discard(key)
            self.specs.pop(key, None)
        else:
            self.closing.add(key)

    async def take(
        self, key: str, indices: list[int], until: int, node: str, hold_s: float, lost: list[int] | None = None
    ) -> dict[str, Any]:
        """References of those of `indices` that exist, as soon as one does, or after `hold_s`.

        `until`: the reader goes on to that index, so batches up to it may be made ahead. `lost`: indices whose objects
        the reader could not get. Returns `ready` (index → (reference, was it found)), `errors` (index → reason), and
        `waiting_for`, `alone_s` where there is neither; `unknown` for a key that is not open.
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
        """Counts since this coordinator started, and who is doing what."""
        now = time.monotonic()
        idle, running = {}, defaultdict(float)
        for name, begun in self.making.values():
            running[name] += now - begun
        for worker in self.workers:
            busy = worker.busy_s + running[worker.name]
            span = (now - worker.since) * self.settings.slots
            idle[worker.name] = 1.0 - min(1.0, busy / span) if worker.since and span else None
        return {
            **self.counts,
            "synthesizers": len(self.workers),
            "synthesizers_up": self.num_up,
            "queue_depth": self.schedule.queue_depth,
            "in_flight": sum(len(state.in_flight) for state in self.schedule.keys.values()),
            "held_bytes": self.schedule.held_bytes,
            "images_per_s": self.counts["images"] / (now - self.start),
            "idle": idle,
            "keys": len(self.specs),
            "numerics": self.numerics,
            "trouble": {worker.name: worker.trouble for worker in self.workers if not worker.up},
            "seconds": now - self.start,
            # Of this process, all threads: one near a core is the fleet's limit.
            "cpu_s": time.process_time(),
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def actors(self) -> list[Any]:
        """The synthesizers' handles, for tests that kill them."""
        return [worker.actor for worker in self.workers]

    def where(self, key: str, index: int) -> dict[str, Any]:
        """For a reader that gets nothing now: what it waits for, and how long there has been no synthesizer."""
        alone_s = 0.0 if self.num_up else time.monotonic() - self.last_alive
        return {"waiting_for": self.waiting_for(key, index), "alone_s": alone_s}

    def waiting_for(self, key: str, index: int) -> str:
        """In words, where a batch stands."""
        if (key, index) in self.making:
            name, begun = self.making[key, index]
            return f"{name} has been making it for {time.monotonic() - begun:.0f} s"
        if not self.num_up:
            troubles = "; ".join(f"{worker.name}: {worker.trouble}" for worker in self.workers[:3])
            need = f"{self.settings.cpus:g} CPUs and {self.settings.gpus:g} GPUs"
            return f"a synthesizer to start ({need} each; {troubles})"
        return f"a free synthesizer: {self.num_up} up, {self.schedule.queue_depth} batches queued"

    # ---- the fleet ---------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Batches that are made ahead of a reader."""
        return max(self.settings.window, 2 * self.settings.slots * len(self.workers))

    @property
    def num_up(self) -> int:
        """Synthesizers that answer."""
        return sum(worker.up for worker in self.workers)

    def spawn(self, coroutine: Any) -> asyncio.Task:
        """Run in the background; the loop alone would not keep it alive."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    def add_worker(self, *, in_group: bool) -> None:
        """Start one more synthesizer: one of the fleet's reservation, or one beyond it."""
        number = self.num_started
        self.num_started += 1
        actor = self.start_actor(number if in_group else None)
        worker = Worker(f"synthesizer {number}", actor, number, in_group=in_group)
        self.workers.append(worker)
        self.spawn(self.bring_up(worker))

    def remove_worker(self, worker: Worker) -> None:
        """End a synthesizer that makes nothing; what it reserved is free, or asked for no more.

        To Ray a machine is not idle while batches that somebody refers to lie there: those in the cache are let go.
        """
        worker.removed, worker.up = True, False
        self.workers.remove(worker)
        for key, index in worker.made if self.settings.cache_root else ():
            self.schedule.forget(key, index)
        ray.kill(worker.actor)

    def start_actor(self, bundle: int | None) -> Any:
        """An actor in its own reservation, where it never has to compete for a restart; or (None) an added one."""
        settings = self.settings
        if bundle is not None:
            cpus = settings.cpus
            strategy: Any = PlacementGroupSchedulingStrategy(settings.placement_group, bundle)
        else:  # the reasons are in placement.py
            cpus = settings.added_cpus
            strategy = "DEFAULT" if cpus and not settings.gpus else "SPREAD"
        options = {
            "num_cpus": cpus,
            "num_gpus": settings.gpus,
            "max_restarts": -1,
            "max_task_retries": 0,
            "scheduling_strategy": strategy,
        }
        if settings.slots > 1:
            options["max_concurrency"] = 2 * settings.slots
        actor: Any = ray.remote(settings.make)
        return actor.options(**options).remote(settings.cache_root, settings.device, fetch_first)

    async def bring_up(self, worker: Worker) -> None:
        """Wait until an actor answers, starting another in its place where it is dead for good."""
        pause = 0.2
        while True:
            try:
                hello = await worker.actor.hello.remote()
                break
            except RayTaskError as error:
                reason = kind_and_words(error)
            except RayError as error:
                reason = str(error).strip().splitlines()[-1].strip()[:300]  # of a traceback, the error itself
            worker.trouble = reason
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
            if worker.removed:
                return
            if pause > 1.0:  # Ray restarts it within a second or two, or not at all
                worker.actor = self.start_actor(worker.number if worker.in_group else None)
        if worker.removed:
            return
        if self.numerics is None and not self.restarted:
            self.numerics = hello["numerics"]
            self.numerics_known.set()
        await self.numerics_known.wait()  # after a restart: the class the sweep began with, as the readers know it
        if hello["numerics"] != self.numerics:
            # Its images would differ in the last bits: which slot makes a batch must not matter.
            worker.trouble = f"left out: it computes as {hello['numerics']}, the fleet as {self.numerics}"
            log.warning("%s on %s %s", worker.name, hello["host"], worker.trouble)
            worker.left_out = True
            ray.kill(worker.actor)
            return
        worker.opened.clear()
        worker.up, worker.trouble, worker.node = True, "", hello["node"]
        worker.since = worker.since or time.monotonic()
        worker.free_since = self.last_alive = time.monotonic()
        self.offer(worker)
        self.pump()

    def pump(self) -> None:
        """Give every free slot a batch to make, and every free reader a shard.

        A batch goes to the node of a reader that waits for it, where somebody is free there: no transfer for that one.
        """
        while (first := self.first_free("")) and (job := self.schedule.next_to_make()):
            worker = self.first_free(self.readers.get(job, "")) or first
            worker.busy += 1
            self.spawn(self.make_batch(worker, *job))
        while self.to_read and self.num_reading < MAX_READS:
            self.num_reading += 1
            self.spawn(self.read_batch(*self.to_read.pop(0)))

    def offer(self, worker: Worker) -> None:
        """It may have a free slot."""
        for where in ("", worker.node):
            if where not in worker.offered:
                worker.offered.add(where)
                heapq.heappush(self.free.setdefault(where, []), (worker.number, id(worker), worker))

    def first_free(self, where: str) -> Worker | None:
        """The first synthesizer on a node, or ("") anywhere, that has a free slot."""
        heap = self.free.get(where, [])
        while heap:
            worker = heap[0][-1]
            if worker.up and worker.busy < self.settings.slots and where in ("", worker.node):
                return worker
            heapq.heappop(heap)
            worker.offered.discard(where)
        return None

    async def make_batch(self, worker: Worker, key: str, index: int) -> None:
        """Have one batch made; whatever happens, the slot is free or down afterwards, and the batch accounted for."""
        begun = time.monotonic()
        actor = worker.actor
        self.making[key, index] = (worker.name, begun)
        try:
            if key not in worker.opened:
                actor.open.remote(self.specs[key])
                worker.opened.add(key)
            reference, told = actor.batch.options(num_returns=2).remote(key, index)
            info = await asyncio.wait_for(asyncio.wrap_future(told.future()), self.settings.batch_timeout_s)
        except RayTaskError as error:
            self.failed(worker, key, index, error)
        except TimeoutError:
            self.timeouts[key, index] = self.timeouts.get((key, index), 0) + 1
            self.died(worker, key, index, f"no batch within {self.settings.batch_timeout_s:g} s")
            ray.kill(actor, no_restart=False)
        except RayError as error:
            self.died(worker, key, index, " ".join(str(error).split())[:300])
        else:
            found = info["found"]
            in_cache = self.specs[key].folder(self.settings.cache_root, str(self.numerics)) is not None
            self.schedule.hold(key, index, reference, info["size_bytes"], cached=in_cache, fresh=not found)
            self.counts["found" if info["found"] else "made"] += 1
            if not info["found"]:
                self.counts["images"] += info["num_images"]
                self.metrics.images.inc(info["num_images"])
            worker.num_batches += 1
            if not worker.in_group:
                worker.made.add((key, index))
        finally:
            self.making.pop((key, index), None)
            worker.busy_s += time.monotonic() - begun
            worker.busy -= 1
            worker.free_since = time.monotonic()
            self.offer(worker)
            if worker.up:
                self.last_alive = time.monotonic()
        self.tell(key, index)
        if key in self.closing:
            self.drop(key)

    def failed(self, worker: Worker, key: str, index: int, error: RayTaskError) -> None:
        """Making a batch raised: some errors pass, the others are the batch's own."""
        if isinstance(error.cause, NotOpened):
            worker.opened.discard(key)
            self.schedule.not_there(key, index)
        elif isinstance(error.cause, ObjectLostError) and self.specs[key].state is not None:
            self.stale.add(key)  # the trial that had put the state there is gone
            self.schedule.not_there(key, index)
        elif isinstance(error.cause, OSError) and self.disk_errors.get((key, index), 0) + 1 < MAX_DISK_ERRORS:
            self.disk_errors[key, index] = self.disk_errors.get((key, index), 0) + 1
            log.warning("batch %d of %s: %s; trying again", index, key[:12], kind_and_words(error))
            self.schedule.not_there(key, index)
        else:
            self.schedule.fail(key, index, kind_and_words(error))

    def died(self, worker: Worker, key: str, index: int, reason: str) -> None:
        """A synthesizer is gone, and with it the batch it was making."""
        self.counts["deaths"] += 1
        self.deaths[key, index] = self.deaths.get((key, index), 0) + 1
        if self.deaths[key, index] >= MAX_DEATHS:
            self.schedule.fail(key, index, f"RuntimeError: {MAX_DEATHS} synthesizers died making it; last: {reason}")
        elif self.timeouts.get((key, index), 0) >= MAX_TIMEOUTS:
            self.schedule.fail(key, index, f"TimeoutError: {reason}, {MAX_TIMEOUTS} times; raise --batch-timeout")
        else:
            self.schedule.not_there(key, index)
        if worker.up:
            worker.up, worker.trouble = False, reason
            self.spawn(self.bring_up(worker))

    async def read_batch(self, key: str, index: int, node: str) -> None:
        """Bring a shard from the cache into the object store of the node that wants it."""
        reference = info = None
        try:
            near = NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT"
            reader = self.shard_reader.options(num_cpus=0, num_returns=2, scheduling_strategy=near)
            reference, told = reader.remote(self.settings.cache_root, key, self.numerics, index)
            info = await asyncio.wait_for(asyncio.wrap_future(told.future()), self.settings.batch_timeout_s)
        except (RayError, TimeoutError) as error:
            log.warning("reading batch %d of %s from the cache: %s", index, key[:12], kind_and_words(error))
        if info is None:
            self.counts["damaged"] += 1
            self.schedule.not_there(key, index)
        else:
            self.schedule.hold(key, index, reference, info["size_bytes"], cached=True, fresh=False)
            self.counts["read"] += 1
            self.metrics.found.inc()
        self.num_reading -= 1
        self.tell(key, index)

    def tell(self, key: str, index: int) -> None:
        """Wake who waits for this batch, if it is there or has failed; and see to the next."""
        if self.schedule.reference(key, index) is not None or index in self.schedule.keys[key].errors:
            self.readers.pop((key, index), None)
            for future in self.arrived.pop((key, index), ()):
                if not future.done():
                    future.set_result(None)
        self.pump()

    async def tick(self) -> None:
        """Metrics, and growth with the cluster."""
        while True:
            await asyncio.sleep(TICK_S)
            self.metrics.show(self.status())
            if self.settings.most is not None:
                self.resize(await self.most())

    async def most(self) -> int:
        """How many synthesizers there may be now, those of the reservation too."""
        settings = self.settings
        if settings.most != "auto":
            return settings.most or settings.num_synthesizers
        alive = [node for node in await asyncio.to_thread(nodes) if node.cpus]
        return automatic(alive, settings.threads, settings.gpus, settings.trial_gpus)

    def resize(self, most: int) -> None:
        """Add synthesizers where batches are waited for; of a range, remove those that have nothing to do.

        Those that "auto" adds stay: they hold no CPUs, and one that is removed would have to be started again.
        """
        settings, now, demand = self.settings, time.monotonic(), self.schedule.demand
        if demand:
            self.last_wanted = now
        added = [worker for worker in self.workers if not worker.in_group]
        may_go = [] if settings.most == "auto" else added
        idle = [one for one in may_go if one.up and not one.busy and now - one.free_since >= settings.idle_s]
        counts = growth.Counts(
            fewest=settings.num_synthesizers,
            most=most,
            up=self.num_up,
            free=sum(worker.up and worker.busy < settings.slots for worker in self.workers),
            added=len(added),
            pending=sum(not worker.up and not worker.left_out for worker in added),
            idle=len(idle),
            demand=demand,
            quiet=now - self.last_wanted >= min(QUIET_S, settings.idle_s),
        )
        step = growth.change(counts)
        for worker in idle[: step.remove] + [one for one in may_go if step.withdraw and not one.up]:
            self.remove_worker(worker)
        for _ in range(step.add):
            self.add_worker(in_group=False)


def nodes() -> list[Node]:
    """The machines that are alive now."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def fetch_first(given: list[Any]) -> Any:
    """What is behind the reference in a spec: a teacher, or the state of a round."""
    return ray.get(given[0])


def kind_and_words(error: BaseException) -> str:
    """What an error says, its kind before that; of one in another process the cause, without the remote traceback."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
    file = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
    return f"{type(cause).__name__}: {file}{in_one_line(cause)}"
