"""The pool of synthesizer actors: starts, adds, replaces and removes them, and keeps track of their free slots.

A slot makes one batch at a time. The coordinator decides which batch comes next, and whether a lost one is made again.
All methods run on its event loop; no state is shared between threads.
"""

import asyncio
import heapq
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dfkd_ray.fleet import growth
from dfkd_ray.fleet.placement import automatic
from dfkd_ray.fleet.session import nodes
from dfkd_ray.fleet.settings import Settings
from dfkd_ray.fleet.synthesizer import NotOpened, Spec
from dfkd_ray.storage import in_one_line

MAX_FAILED_STARTS = 5  # of every synthesizer, before a fleet of which none was ever up is called impossible
QUIET_S = 10.0  # without demand, before synthesizers that are still pending are withdrawn
log = logging.getLogger(__name__)


@dataclass
class Worker:
    """One synthesizer actor and its state."""

    name: str
    actor: Any
    number: int = 0  # by the order of starting
    up: bool = False
    offered: set[str] = field(default_factory=set)  # the heaps of free slots that it is in
    busy: int = 0
    opened: set[str] = field(default_factory=set)
    busy_s: float = 0.0
    since: float = 0.0
    trouble: str = "starting"
    failed_starts: int = 0  # since it was last up
    node: str = ""
    free_since: float = 0.0
    in_group: bool = True  # in the fleet's placement group; others were added later
    left_out: bool = False  # its numerics class is not the fleet's
    removed: bool = False
    made: set[tuple[str, int]] = field(default_factory=set)  # batches; only of an added one


class Lost(Exception):
    """A synthesizer died, or was killed because it `hung`, while it was making a batch."""

    def __init__(self, reason: str, *, hung: bool):
        super().__init__(reason)
        self.hung = hung


class Pool:
    """All synthesizers of a fleet. `spawn` runs a coroutine in the background; `on_up` is called when one is up."""

    def __init__(
        self, settings: Settings, spawn: Callable[[Coroutine[Any, Any, None]], Any], on_up: Callable[[], None]
    ):
        self.settings, self.spawn, self.on_up = settings, spawn, on_up
        self.members: list[Worker] = []
        # Synthesizers that may have a free slot: a heap per node, and one for all nodes under "".
        self.free: dict[str, list[tuple[int, int, Worker]]] = {}
        self.making: dict[tuple[str, int], tuple[str, float]] = {}  # batch → name of its maker, since when
        self.num_started = 0
        self.numerics: str | None = None
        self.numerics_known = asyncio.Event()
        self.none_can_start = asyncio.Event()
        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.last_alive = self.last_wanted = time.monotonic()
        for _ in range(settings.num_synthesizers):
            self.add(in_group=True)

    @property
    def num_up(self) -> int:
        """The number of synthesizers that answer."""
        return sum(worker.up for worker in self.members)

    @property
    def alone_s(self) -> float:
        """Seconds for which no synthesizer has been up; 0 if one is."""
        return 0.0 if self.num_up else time.monotonic() - self.last_alive

    @property
    def trouble(self) -> dict[str, str]:
        """The reason of each synthesizer that is not up, by its name."""
        return {worker.name: worker.trouble for worker in self.members if not worker.up}

    def idle_shares(self) -> dict[str, float | None]:
        """Share of the time since it was up that each synthesizer was idle; None if it has not been up."""
        now, running = time.monotonic(), defaultdict(float)
        for name, begun in self.making.values():
            running[name] += now - begun
        shares: dict[str, float | None] = {}
        for worker in self.members:
            busy, span = worker.busy_s + running[worker.name], (now - worker.since) * self.settings.slots
            shares[worker.name] = 1.0 - min(1.0, busy / span) if worker.since and span else None
        return shares

    def add(self, *, in_group: bool) -> None:
        """Start one more synthesizer, inside the fleet's placement group or outside it."""
        number = self.num_started
        self.num_started += 1
        actor = self.start_actor(number if in_group else None)
        worker = Worker(f"synthesizer {number}", actor, number, in_group=in_group)
        self.members.append(worker)
        self.spawn(self.bring_up(worker))

    def start_actor(self, bundle: int | None) -> Any:
        """Start an actor in its bundle of the placement group, where a restart has resources; None: an added one."""
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
        """Wait until a synthesizer answers, then offer its slots; it is left out if its numerics class differs."""
        hello = await self.answer(worker)
        if hello is None:
            return
        if not self.restarted:
            self.settle(hello["numerics"])
        numerics = await self.settled()
        if hello["numerics"] != numerics:
            # Its images would differ in the last bits: which slot makes a batch must not matter.
            worker.trouble = f"left out: it computes as {hello['numerics']}, the fleet as {numerics}"
            log.warning("%s on %s %s", worker.name, hello["host"], worker.trouble)
            worker.left_out = True
            ray.kill(worker.actor)
            return
        worker.opened.clear()
        worker.up, worker.trouble, worker.node, worker.failed_starts = True, "", hello["node"], 0
        worker.since = worker.since or time.monotonic()
        worker.free_since = self.last_alive = time.monotonic()
        self.offer(worker)
        self.on_up()

    async def answer(self, worker: Worker) -> dict[str, Any] | None:
        """A synthesizer's first answer; its actor is replaced if it stays dead. None if it was removed."""
        pause = 0.2
        while True:
            try:
                hello = await worker.actor.hello.remote()
                return None if worker.removed else hello
            except RayTaskError as error:
                worker.trouble = error_text(error)
            except RayError as error:
                worker.trouble = str(error).strip().splitlines()[-1].strip()[:300]  # of a traceback, the error itself
            worker.failed_starts += 1
            if min(member.failed_starts for member in self.members) >= MAX_FAILED_STARTS:
                self.none_can_start.set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
            if worker.removed:
                return None
            if pause > 1.0:  # Ray restarts it within a second or two, or not at all
                ray.kill(worker.actor)  # if it came up after all, it would keep the reservation from the other
                worker.actor = self.start_actor(worker.number if worker.in_group else None)

    def settle(self, numerics: str) -> None:
        """Set the fleet's numerics class, unless it is set: that of the first synthesizer that is up.

        After a restart of the coordinator it comes from the readers, who know the class that the sweep began with.
        """
        if self.numerics is None:
            self.numerics = numerics
            self.numerics_known.set()

    async def settled(self) -> str:
        """Wait for the fleet's numerics class."""
        await self.numerics_known.wait()
        assert self.numerics is not None
        return self.numerics

    def offer(self, worker: Worker) -> None:
        """Note that a synthesizer may have a free slot."""
        for where in ("", worker.node):
            if where not in worker.offered:
                worker.offered.add(where)
                heapq.heappush(self.free.setdefault(where, []), (worker.number, id(worker), worker))

    def first_free(self, where: str = "") -> Worker | None:
        """The first synthesizer with a free slot on a node, or on any node if `where` is empty."""
        heap = self.free.get(where, [])
        while heap:
            worker = heap[0][-1]
            if worker.up and worker.busy < self.settings.slots and where in ("", worker.node):
                return worker
            heapq.heappop(heap)
            worker.offered.discard(where)
        return None

    def take_slot(self, near: str) -> Worker:
        """Take a free slot, on the node `near` if it has one. One slot must be free."""
        worker = self.first_free(near) or self.first_free()
        assert worker is not None
        worker.busy += 1
        return worker

    def reopen(self, key: str) -> None:
        """Send the spec of this key to each synthesizer again before its next batch of the key."""
        for worker in self.members:
            worker.opened.discard(key)

    async def make(self, worker: Worker, spec: Spec, index: int) -> tuple[Any, dict[str, Any]]:
        """Have a batch made in a slot that was taken; returns its reference and its info.

        Frees the slot. `RayTaskError` if making the batch raised, `Lost` if the synthesizer is gone.
        """
        begun, actor, batch = time.monotonic(), worker.actor, (spec.key, index)
        self.making[batch] = (worker.name, begun)
        try:
            if spec.key not in worker.opened:
                actor.open.remote(spec)
                worker.opened.add(spec.key)
            ref, info_ref = actor.batch.options(num_returns=2).remote(*batch)
            info = await asyncio.wait_for(asyncio.wrap_future(info_ref.future()), self.settings.batch_timeout_s)
            if not worker.in_group:
                worker.made.add(batch)
            return ref, info
        except RayTaskError as error:
            if isinstance(error.cause, NotOpened):
                worker.opened.discard(spec.key)
            raise
        except TimeoutError:
            lost = self.lose(worker, f"no batch within {self.settings.batch_timeout_s:g} s", hung=True)
            ray.kill(actor, no_restart=False)
            raise lost from None
        except RayError as error:
            raise self.lose(worker, " ".join(str(error).split())[:300], hung=False) from None
        finally:
            self.making.pop(batch, None)
            worker.busy_s += time.monotonic() - begun
            worker.busy -= 1
            worker.free_since = time.monotonic()
            self.offer(worker)
            if worker.up:
                self.last_alive = time.monotonic()

    def lose(self, worker: Worker, reason: str, *, hung: bool) -> Lost:
        """Note that a synthesizer is gone, and bring it up again; returns the exception to raise."""
        if worker.up:
            worker.up, worker.trouble = False, reason
            self.spawn(self.bring_up(worker))
        return Lost(reason, hung=hung)

    async def most(self) -> int:
        """The largest number of synthesizers allowed now, including those of the placement group."""
        settings = self.settings
        if settings.most != "auto":
            return settings.most or settings.num_synthesizers
        alive = [node for node in await asyncio.to_thread(nodes) if node.cpus]
        return automatic(alive, settings.threads, settings.gpus, settings.trial_gpus)

    def resize(self, demand: int, most: int) -> list[tuple[str, int]]:
        """Add synthesizers while batches are waited for; of a range, also remove idle ones.

        Synthesizers that "auto" added stay: they reserve no CPUs, and a removed one would have to be started again.
        Returns the batches that the removed ones had made.
        """
        settings, now = self.settings, time.monotonic()
        if demand:
            self.last_wanted = now
        added = [worker for worker in self.members if not worker.in_group]
        may_go = [] if settings.most == "auto" else added
        idle = [one for one in may_go if one.up and not one.busy and now - one.free_since >= settings.idle_s]
        counts = growth.Counts(
            fewest=settings.num_synthesizers,
            most=most,
            up=self.num_up,
            free=sum(worker.up and worker.busy < settings.slots for worker in self.members),
            added=len(added),
            pending=sum(not worker.up and not worker.left_out for worker in added),
            idle=len(idle),
            demand=demand,
            quiet=now - self.last_wanted >= min(QUIET_S, settings.idle_s),
        )
        step = growth.change(counts)
        gone = idle[: step.remove] + [one for one in may_go if step.withdraw and not one.up]
        for worker in gone:
            self.remove(worker)
        for _ in range(step.add):
            self.add(in_group=False)
        return [batch for worker in gone for batch in worker.made]

    def remove(self, worker: Worker) -> None:
        """Kill an idle or pending synthesizer; its reservation, or its request for one, ends."""
        worker.removed, worker.up = True, False
        self.members.remove(worker)
        ray.kill(worker.actor)


def fetch_first(given: list[Any]) -> Any:
    """Fetch the object of a reference in a spec: a teacher, or the state of a round."""
    return ray.get(given[0])


def error_text(error: BaseException) -> str:
    """Type and text of an error; of an error in another process its cause, without the remote traceback."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
    file = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
    return f"{type(cause).__name__}: {file}{in_one_line(cause)}"
