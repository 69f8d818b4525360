"""When a range of synthesizers grows and shrinks: the decision, and the demand that it is made by."""

import itertools
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from dfkd_ray.fleet.coordinator import Coordinator, Settings, Worker
from dfkd_ray.fleet.growth import Change, Counts, change
from dfkd_ray.fleet.schedule import Key, Schedule

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


# ---- what the coordinator does of it --------------------------------------------------------------------------------


def coordinator_of(workers: list[Worker], **more) -> tuple[Any, list]:
    """As much of a coordinator as its decisions need; what it has begun to make, by whom."""
    begun: list = []
    settings = Settings(num_synthesizers=1, cpus=0.1, most=8, idle_s=60.0)
    values = {"settings": settings, "workers": workers, "readers": {}, "to_read": [], "num_reading": 0}
    made = {"spawn": begun.append, "make_batch": lambda worker, _key, index: (worker.name, index)}
    fleet: Any = SimpleNamespace(**values | made | more, free={})
    fleet.offer, fleet.first_free = partial(Coordinator.offer, fleet), partial(Coordinator.first_free, fleet)
    for number, worker in enumerate(workers):
        worker.number = number
        fleet.offer(worker)
    return fleet, begun


def test_a_batch_goes_to_a_free_synthesizer_on_the_node_of_who_waits_for_it():
    workers = [Worker(f"s{node}", None, up=True, node=node) for node in ("a", "b", "c")]
    waits = {("k", 0): "c", ("k", 1): "c", ("k", 2): "elsewhere"}
    fleet, begun = coordinator_of(workers, schedule=waiting(4, 4), readers=waits)
    Coordinator.pump(fleet)
    assert begun == [("sc", 0), ("sa", 1), ("sb", 2)], "and to anybody where nobody is free there: none waits for that"


def test_only_what_was_added_is_removed_and_only_when_it_is_idle_or_not_up(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr("dfkd_ray.fleet.coordinator.time.monotonic", lambda: now)
    first = Worker("first", None, up=True, free_since=now - 1000)
    idle = Worker("idle", None, up=True, in_group=False, free_since=now - 61)
    busy = Worker("busy", None, up=True, in_group=False, free_since=now - 1000, busy=1)
    just = Worker("just idle", None, up=True, in_group=False, free_since=now - 5)
    pending = Worker("pending", None, in_group=False)
    left_out = Worker("left out", None, in_group=False, left_out=True)
    workers, gone = [first, idle, busy, just, pending, left_out], []
    fleet, _ = coordinator_of(
        workers, schedule=Schedule(1), num_up=4, last_wanted=now - 5, remove_worker=lambda one: gone.append(one.name)
    )
    Coordinator.resize(fleet, 8)
    assert gone == ["idle"]
    fleet.last_wanted = now - 20
    Coordinator.resize(fleet, 8)
    assert gone[1:] == ["idle", "pending", "left out"]


@pytest.mark.parametrize("cache_root", [None, "/cache"])
def test_what_a_removed_synthesizer_made_is_let_go_where_the_cache_has_it(monkeypatch, cache_root):
    monkeypatch.setattr("ray.kill", lambda actor: None)
    schedule = waiting(0, 0)
    for index in range(3):
        schedule.hold("k", index, f"reference {index}", 10, cached=cache_root is not None, fresh=False)
    worker = Worker("added", None, up=True, in_group=False, made={("k", 0), ("k", 2)})
    settings = Settings(num_synthesizers=1, cpus=0.1, most=8, cache_root=cache_root)
    fleet, _ = coordinator_of([worker], schedule=schedule, settings=settings)
    Coordinator.remove_worker(fleet, worker)
    assert worker.removed and not worker.up and fleet.workers == []
    held = [index for index in range(3) if schedule.reference("k", index) is not None]
    assert held == ([1] if cache_root else [0, 1, 2]), "without a cache it would have to be made again"
