"""When a fleet grows and shrinks: the decision, the demand that it is made by, and what is added and removed."""

import asyncio
import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayError

from dfkd_ray.fleet.coordinator import Coordinator
from dfkd_ray.fleet.growth import Change, Counts, change
from dfkd_ray.fleet.placement import Node
from dfkd_ray.fleet.pool import Pool, Worker
from dfkd_ray.fleet.schedule import Key, Schedule
from dfkd_ray.fleet.settings import Settings

BUSY = Counts(fewest=1, most=64, up=1, free=0, demand=100)
CASES = [
    Counts(fewest, most, up, free, added, pending, idle, demand, quiet)
    for fewest, most, up, added, pending, demand, quiet in itertools.product(
        (1, 4), (4, 5, 64), (0, 1, 4, 7, 64), (0, 1, 3, 60), (0, 1, 3), (0, 1, 1000), (False, True)
    )
    for free in (0, up)
    for idle in {0, min(free, added - pending)}
    if pending <= added and added <= most - fewest and up <= fewest + added - pending and not (demand and quiet)
]


def test_a_fleet_never_leaves_its_range_and_at_most_doubles():
    for counts in CASES:
        step = change(counts)
        assert 0 <= step.add <= max(0, min(counts.up, counts.most - counts.fewest - counts.added)), counts
        assert step.add <= counts.demand and 0 <= step.remove <= counts.added - counts.pending, counts


def test_it_grows_only_while_batches_are_waited_for_nobody_is_free_and_nobody_is_pending():
    grown = [counts for counts in CASES if change(counts).add]
    assert grown and all(one.demand and not one.free and not one.pending for one in grown)
    assert change(BUSY) == Change(add=1)
    for other in ({"demand": 0}, {"free": 1}, {"added": 1, "pending": 1}):
        assert change(replace(BUSY, **other)).add == 0


def test_it_never_adds_and_takes_away_in_one_step():
    assert all(not (step.remove or step.withdraw) for step in map(change, CASES) if step.add)


def test_the_pending_are_withdrawn_when_it_has_been_quiet_and_not_before():
    pending = Counts(fewest=1, most=64, up=1, free=1, added=1, pending=1)
    assert not change(pending).withdraw and change(replace(pending, quiet=True)).withdraw
    assert not any(change(counts).withdraw for counts in CASES if counts.demand)


def test_the_added_that_are_idle_go_and_the_first_stay():
    idle = Counts(fewest=2, most=64, up=8, free=8, added=6, idle=6, quiet=True)
    assert change(idle).remove == 6
    assert change(replace(idle, up=2, free=2, added=0, idle=0)).remove == 0


def test_from_one_to_all_in_doubling_steps():
    up, sizes = 1, [1]
    while step := change(replace(BUSY, up=up, added=up - 1)).add:
        up += step
        sizes.append(up)
    assert sizes == [1, 2, 4, 8, 16, 32, 64]


# ---- demand ---------------------------------------------------------------------------------------------------------


def waiting(num: int, until: int, **state) -> Schedule:
    schedule = Schedule(100)
    schedule.keys["k"] = Key(**state)
    schedule.wait("k", until)
    for index in range(num):
        schedule.ask("k", index)
    return schedule


def test_demand_sees_beyond_every_window_what_a_waiting_reader_will_want():
    schedule = waiting(4, 1000)
    assert schedule.demand == 1000
    assert schedule.next_to_make() == ("k", 0) and schedule.demand == 999
    assert schedule.queue_depth == 3, "of which the queue shows only what is waited for now"


def test_what_exists_is_being_made_or_cannot_be_made_is_no_demand():
    assert waiting(1, 10, cached={2, 3, 40}, in_flight={4}, errors={5: "no"}).demand == 10 - 4
    schedule = waiting(1, 10)
    schedule.hold("k", 7, "reference", 10, cached=False, fresh=True)
    assert schedule.demand == 9


def test_a_reader_that_has_gone_leaves_no_demand():
    schedule = waiting(2, 50)
    schedule.stop_waiting("k", 50)
    for index in range(2):
        schedule.stop_asking("k", index)
    assert schedule.demand == 0


@pytest.mark.parametrize("others", [(), (5,), (5, 30, 30)])
def test_of_several_readers_the_furthest_counts(others):
    schedule = waiting(1, 30)
    for until in others:
        schedule.wait("k", until)
    assert schedule.demand == 30


# ---- what the fleet does of it --------------------------------------------------------------------------------------


def workers_of(members: list[Worker], **settings) -> Any:
    """As much of a fleet as its decisions need, without actors; `started` counts those that it adds."""
    pool = object.__new__(Pool)
    pool.settings = Settings(**{"num_synthesizers": 1, "cpus": 0.1, "most": 8, "idle_s": 60.0} | settings)
    pool.members, pool.free, pool.num_started = members, {}, len(members)
    pool.last_wanted = time.monotonic()
    pool.start_actor = lambda bundle: f"actor beside bundle {bundle}"
    pool.spawn = lambda job: job.close()
    for number, worker in enumerate(members):
        worker.number = number
        pool.offer(worker)
    return pool


def test_a_batch_goes_to_a_free_synthesizer_on_the_node_of_who_waits_for_it(monkeypatch):
    coordinator, begun = object.__new__(Coordinator), []
    monkeypatch.setattr(coordinator, "spawn", lambda job: None)
    monkeypatch.setattr(coordinator, "make_batch", lambda worker, _key, index: begun.append((worker.name, index)))
    coordinator.pool = workers_of([Worker(f"s{node}", None, up=True, node=node) for node in ("a", "b", "c")])
    coordinator.readers = {("k", 0): "c", ("k", 1): "c", ("k", 2): "elsewhere"}
    coordinator.schedule, coordinator.to_read, coordinator.num_reading = waiting(4, 4), [], 0
    coordinator.pump()
    assert begun == [("sc", 0), ("sa", 1), ("sb", 2)], "and to anybody where nobody is free there: none waits for that"


def test_only_what_was_added_is_removed_and_only_when_it_is_idle_or_not_up(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr("dfkd_ray.fleet.pool.time.monotonic", lambda: now)
    members = members_at(now)
    pool, gone = workers_of(members), []
    monkeypatch.setattr(pool, "remove", lambda one: gone.append(one.name))
    pool.last_wanted = now - 5
    assert pool.resize(0, 8) == [("k", 7)] and gone == ["idle"]
    pool.last_wanted = now - 20
    pool.resize(0, 8)
    assert gone[1:] == ["idle", "pending", "left out"] and pool.members == members


def members_at(now: float) -> list[Worker]:
    """One of the reservation, and one of each kind that was added."""
    return [
        Worker("first", None, up=True, free_since=now - 1000),
        Worker("idle", None, up=True, in_group=False, free_since=now - 61, made={("k", 7)}),
        Worker("busy", None, up=True, in_group=False, free_since=now - 1000, busy=1, made={("k", 8)}),
        Worker("just idle", None, up=True, in_group=False, free_since=now - 5),
        Worker("pending", None, in_group=False),
        Worker("left out", None, in_group=False, left_out=True),
    ]


def test_what_the_automatic_number_has_added_stays(monkeypatch):
    pool = workers_of(members_at(time.monotonic()), most="auto")
    monkeypatch.setattr(pool, "remove", lambda one: pytest.fail(f"{one.name} was removed"))
    pool.last_wanted -= 1000
    for most in (8, 1):  # also where machines are gone
        assert pool.resize(0, most) == [] and len(pool.members) == 6


@pytest.mark.parametrize("most", [4, "auto"])
def test_both_ranges_and_the_automatic_number_grow_in_doubling_steps_up_to_the_most(monkeypatch, most):
    machines = [Node(2.0), Node(0.0), Node(1.0)]
    monkeypatch.setattr("dfkd_ray.fleet.pool.nodes", lambda: machines)
    pool, sizes = workers_of([Worker("first", None, up=True, busy=1)], most=most), [1]
    while pool.resize(100, asyncio.run(pool.most())) == [] and len(pool.members) > sizes[-1]:
        sizes.append(len(pool.members))
        for worker in pool.members:
            worker.up, worker.busy = True, 1
    assert sizes == ([1, 2, 4] if most == 4 else [1, 2, 3])
    assert {worker.actor for worker in pool.members[1:]} == {"actor beside bundle None"}
    machines.append(Node(1.0))  # one joins
    pool.resize(100, asyncio.run(pool.most()))
    assert len(pool.members) == 4


def test_a_removed_synthesizer_is_none_of_the_fleet(monkeypatch):
    killed: list = []
    monkeypatch.setattr("ray.kill", killed.append)
    worker = Worker("added", "its actor", up=True, in_group=False)
    pool = workers_of([worker])
    pool.remove(worker)
    assert worker.removed and not worker.up and pool.members == [] and killed == ["its actor"]
    assert pool.first_free() is None


def test_an_actor_that_another_takes_the_place_of_is_ended_first(monkeypatch):
    class Actor:
        def __init__(self, *answers):
            self.answers, self.hello = list(answers), self

        async def remote(self):
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    async def at_once(_seconds):
        pass

    done: list = []
    first, second = Actor(*[RayError("it is gone")] * 3), Actor({"numerics": "cpu"})
    worker = Worker("synthesizer 0", first)
    pool = workers_of([worker])
    monkeypatch.setattr(pool, "start_actor", lambda bundle: done.append(bundle) or second)
    monkeypatch.setattr("ray.kill", done.append)
    monkeypatch.setattr("dfkd_ray.fleet.pool.asyncio.sleep", at_once)
    assert asyncio.run(pool.answer(worker)) == {"numerics": "cpu"}
    assert done == [first, 0] and worker.actor is second, "both have one reservation"


@pytest.mark.parametrize("cache_root", [None, "/cache"])
def test_what_a_removed_synthesizer_made_is_let_go_where_the_cache_has_it(cache_root):
    schedule = waiting(0, 0)
    for index in range(3):
        schedule.hold("k", index, f"reference {index}", 10, cached=cache_root is not None, fresh=False)
    coordinator = object.__new__(Coordinator)
    coordinator.schedule = schedule
    coordinator.settings = Settings(num_synthesizers=1, cpus=0.1, most=8, cache_root=cache_root)
    coordinator.let_go([("k", 0), ("k", 2)])
    held = [index for index in range(3) if schedule.ref("k", index) is not None]
    assert held == ([1] if cache_root else [0, 1, 2]), "without a cache it would have to be made again"
