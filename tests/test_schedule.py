"""The coordinator's decisions: simulated readers and synthesizers that come, wait, die and lose things at random."""

import functools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from dfkd_ray.fleet.schedule import PAGE, Key, Schedule

SIZE = 10  # bytes of a simulated batch
SEEDS = range(30)


def schedule_of(*keys: str, cached: set[int] | None = None, budget: int = 100 * SIZE) -> Schedule:
    schedule = Schedule(budget)
    for key in keys:
        schedule.keys[key] = Key(cached=set(cached or ()))
    return schedule


def drained(schedule: Schedule, slots: int = 1000) -> list[tuple[str, int]]:
    """What free slots would make now, in order."""
    made = []
    while len(made) < slots and (job := schedule.next_to_make()):
        made.append(job)
    return made


def hold(schedule: Schedule, key: str, index: int, *, cached: bool = True, fresh: bool = True) -> None:
    schedule.hold(key, index, f"{key}{index}", SIZE, cached=cached, fresh=fresh)


# ---- a simulation of `Coordinator.take`, `make_batch` and `read_batch`, with every wait made explicit ---------------


@dataclass
class World:
    """What can happen."""

    num_keys: int = 1
    slots: int = 2
    num_readers: int = 4
    length: int = 12
    window: int = 4
    budget: int = 10_000  # batches
    with_cache: bool = True
    cached_before: float = 0.0
    damaged: float = 0.0  # chance that a shard turns out to be damaged
    deaths: float = 0.0  # chance that a batch's maker dies
    failing: float = 0.0  # share of indices that cannot be made
    timeouts: float = 0.0  # chance per step that a wait ends without an answer
    leaving: float = 0.0  # chance per step that a reader is gone
    lost: float = 0.0  # chance per batch that its object is lost in transfer
    late: bool = False  # readers that are told wake later: other things happen first


@dataclass(eq=False)
class Reader:
    """A trial: takes its indices in order, four at a time, as `Stream` does."""

    key: str
    indices: list[int]
    until: int
    have: dict[int, str] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)  # what it waits for; empty while it is not in `take`
    lost: list[int] = field(default_factory=list)
    woken: bool = False
    gone: bool = False

    @property
    def missing(self) -> list[int]:
        return [index for index in self.indices if index not in self.have]


class Simulation:
    """Runs a world to its end and asserts the invariants after every event."""

    def __init__(self, world: World, seed: int):
        self.world, self.random = world, random.Random(seed)
        keys = [f"key{number}" for number in range(world.num_keys)]
        self.schedule = Schedule(world.budget * SIZE)
        self.disk: set[tuple[str, int]] = set()
        for key in keys:
            self.disk |= {(key, i) for i in range(world.length) if self.random.random() < world.cached_before}
            self.schedule.keys[key] = Key(cached={index for name, index in self.disk if name == key})
        self.before = frozenset(self.disk)
        self.readers = []
        for _ in range(world.num_readers):
            begin, end = sorted(self.random.sample(range(world.length + 1), 2))
            self.readers.append(Reader(self.random.choice(keys), list(range(begin, end)), end))
        self.impossible = {(k, i) for k in keys for i in range(world.length) if self.random.random() < world.failing}
        self.making: list[tuple[str, int]] = []
        self.reading: list[tuple[str, int]] = []
        self.exists: set[tuple[str, int]] = set(self.disk)  # and nobody has found out otherwise
        self.allowed: set[tuple[str, int]] = set()
        self.made: Counter[tuple[str, int]] = Counter()
        self.fresh: Counter[tuple[str, int]] = Counter()
        self.deaths: Counter[tuple[str, int]] = Counter()

    def run(self) -> "Simulation":
        for _ in range(200 * self.world.num_readers * self.world.length):
            events = [*self.making, *self.reading, *(reader for reader in self.readers if self.can_move(reader))]
            if not events:
                break
            event = self.random.choice(events)
            if isinstance(event, Reader):
                self.move(event)
            elif event in self.making:
                self.finish_making(*event)
            else:
                self.finish_reading(*event)
            self.pump()
            self.check()
        assert not self.making and not self.reading
        for reader in self.readers:
            assert reader.gone or not reader.missing, f"stalled: {reader}"
        return self

    def can_move(self, reader: Reader) -> bool:
        if reader.gone or not reader.missing:
            return False
        return not reader.asked or reader.woken or self.world.timeouts > 0 or self.world.leaving > 0

    def move(self, reader: Reader) -> None:
        """One step of a reader: a new `take`, or the end of its wait."""
        if self.random.random() < self.world.leaving:
            self.stop(reader)
            reader.gone = True
        elif not reader.asked:
            self.take(reader)
        elif reader.woken:
            self.wake(reader)
        elif self.random.random() < self.world.timeouts:
            self.stop(reader)

    def stop(self, reader: Reader) -> None:
        for index in reader.asked:
            self.schedule.stop_asking(reader.key, index)
        reader.asked, reader.woken = [], False

    def take(self, reader: Reader) -> None:
        schedule, key = self.schedule, reader.key
        for index in reader.lost:
            schedule.forget(key, index)
            self.exists -= {(key, index)} - self.disk
        reader.lost = []
        window = reader.missing[:4]
        self.allowed |= {(key, index) for index in window}
        ahead = min(window) + len(window)
        self.allowed |= {(key, index) for index in range(ahead, min(reader.until, ahead + self.world.window))}
        got = self.collect(reader, window)
        schedule.look_ahead(key, ahead, reader.until, self.world.window)
        for index in window:
            if not got:
                schedule.ask(key, index)
                reader.asked.append(index)
            if index not in got:
                if schedule.wants_reading(key, index):
                    self.reading.append((key, index))
                elif got:
                    schedule.look_ahead(key, index, index + 1, 1)

    def collect(self, reader: Reader, window: list[int]) -> set[int]:
        key, got = reader.key, set()
        for index in window:
            handed = self.schedule.hand_out(key, index)
            if handed is not None:
                ref, found = handed
                assert ref == f"{key} {index}"
                self.fresh[key, index] += not found
                got.add(index)
                if self.random.random() < self.world.lost:
                    reader.lost.append(index)
                else:
                    reader.have[index] = ref
            elif index in self.schedule.keys[key].errors:
                assert (key, index) in self.impossible
                reader.have[index] = "told that it failed"
                got.add(index)
        return got

    def tell(self, key: str, index: int) -> None:
        """Readers that wait for an index get it at once, with whatever else is there; or wake later."""
        for reader in self.readers:
            if reader.key == key and index in reader.asked:
                reader.woken = True
                if not self.world.late:
                    assert index in self.wake(reader)

    def wake(self, reader: Reader) -> set[int]:
        window = reader.asked
        self.stop(reader)
        return self.collect(reader, window)

    def pump(self) -> None:
        while len(self.making) < self.world.slots:
            job = self.schedule.next_to_make()
            if job is None:
                break
            key, index = job
            assert job not in self.making and job not in self.reading, "made twice at a time"
            assert job not in self.exists, "exists already"
            assert job not in self.schedule.held and index not in self.schedule.keys[key].errors
            assert job in self.allowed, "nobody asked for it, and it was never in a window"
            if index not in self.schedule.keys[key].waiting:
                assert not self.left_waiting(), "made ahead while a reader waits"
            self.making.append(job)

    def left_waiting(self) -> set[tuple[str, int]]:
        """What a reader waits for, that is neither there nor on its way."""
        waited = {(reader.key, index) for reader in self.readers if not reader.woken for index in reader.asked}
        return waited - set(self.making) - set(self.reading)

    def finish_making(self, key: str, index: int) -> None:
        job = key, index
        self.making.remove(job)
        if job in self.impossible:
            self.schedule.fail(key, index, "ValueError: no")
            self.tell(key, index)
        elif self.deaths[job] < 5 and self.random.random() < self.world.deaths:
            self.deaths[job] += 1
            self.schedule.not_there(key, index)
        else:
            self.made[job] += 1
            self.arrive(job, fresh=True)

    def finish_reading(self, key: str, index: int) -> None:
        job = key, index
        self.reading.remove(job)
        if self.deaths[job] < 5 and self.random.random() < self.world.damaged:
            self.deaths[job] += 1
            self.exists.discard(job)
            self.disk.discard(job)
            self.schedule.not_there(key, index)
        else:
            self.arrive(job, fresh=False)

    def arrive(self, job: tuple[str, int], *, fresh: bool) -> None:
        key, index = job
        self.exists.add(job)
        if self.world.with_cache:
            self.disk.add(job)
        self.schedule.hold(key, index, f"{key} {index}", SIZE, cached=self.world.with_cache, fresh=fresh)
        self.exists &= self.disk | set(self.schedule.held)  # without a cache, what is dropped is lost
        self.tell(key, index)

    def check(self) -> None:
        schedule, world = self.schedule, self.world
        assert schedule.held_bytes == sum(size for _, size in schedule.held.values())
        assert schedule.held_bytes <= max(world.budget, 1) * SIZE
        if len(self.making) < world.slots:
            assert not self.left_waiting(), "a slot is free, and a reader waits"
        assert world.late or schedule.queue_depth == len(self.left_waiting())
        for key, state in schedule.keys.items():
            assert state.in_flight == {index for name, index in [*self.making, *self.reading] if name == key}
            waited = Counter(index for reader in self.readers if reader.key == key for index in reader.asked)
            assert state.waiting == waited and state.num_waiting == waited.total()
            assert state.listed_wanted <= set(state.wanted) and state.listed_ahead <= set(state.ahead)
            for name in ("wanted", "ahead"):
                assert state.queued[name] == (key in [other for _, _, other in schedule.queues[name]])
                assert state.queued[name] or not getattr(state, name), "listed, and never to be served"
            for index in range(world.length):
                if any(page[index] for page in state.seen.values()):
                    assert index in state.listed_ahead | state.in_flight or schedule.available(key, index)


WORLDS = {
    "one key": World(),
    "three keys, two slots": World(num_keys=3, num_readers=8),
    "many slots": World(num_keys=2, slots=9, num_readers=6),
    "one slot": World(num_keys=3, slots=1, num_readers=6),
    "no slot but the cache": World(slots=0, cached_before=1.0),
    "a cache half full": World(num_keys=2, cached_before=0.5, num_readers=6),
    "damaged shards": World(num_keys=2, cached_before=0.8, damaged=0.4, num_readers=6),
    "a small budget": World(num_keys=2, budget=2, cached_before=0.3, num_readers=6),
    "a budget below one batch": World(budget=0, num_readers=3),
    "deaths": World(num_keys=2, deaths=0.4, num_readers=6),
    "impatient readers": World(num_keys=2, timeouts=0.5, num_readers=6),
    "readers that go": World(num_keys=2, leaving=0.1, timeouts=0.3, num_readers=8),
    "batches that fail": World(num_keys=2, failing=0.3, deaths=0.2, num_readers=6),
    "objects that are lost": World(num_keys=2, lost=0.2, num_readers=6),
    "readers that wake late": World(num_keys=2, late=True, budget=2, timeouts=0.2, lost=0.1, num_readers=8),
    "no cache": World(num_keys=2, with_cache=False, num_readers=6, timeouts=0.2),
    "no cache and lost objects": World(with_cache=False, lost=0.2, timeouts=0.2),
    "no cache and a small budget": World(with_cache=False, budget=3),
    "everything": World(
        num_keys=3,
        slots=3,
        num_readers=10,
        budget=4,
        cached_before=0.3,
        damaged=0.2,
        deaths=0.2,
        failing=0.1,
        timeouts=0.3,
        leaving=0.02,
        lost=0.1,
    ),
}


@functools.cache
def runs_of(name: str) -> list[Simulation]:
    return [Simulation(WORLDS[name], seed).run() for seed in SEEDS]


@pytest.mark.parametrize("name", WORLDS)
def test_every_reader_gets_everything_and_no_invariant_breaks_on_the_way(name):
    runs = runs_of(name)
    assert any(reader.have for run in runs for reader in run.readers)


@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if not world.damaged and world.with_cache])
def test_no_batch_is_made_twice_that_was_not_lost(name):
    for run in runs_of(name):
        assert not run.made or max(run.made.values()) == 1


@pytest.mark.parametrize("name", WORLDS)
def test_a_batch_is_fresh_for_one_reader_only(name):
    for run in runs_of(name):
        had = {(reader.key, i) for reader in run.readers for i, what in reader.have.items() if what.startswith("key")}
        for job in had | set(run.fresh):
            assert run.fresh[job] <= run.made[job]
            if run.made[job] == 1 and job not in run.before:  # of the latter, readers may have had the shard
                assert run.fresh[job] == 1 or job not in had


@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if world.slots])
def test_nothing_stays_listed_when_there_is_nothing_to_make(name):
    for run in runs_of(name):
        for state in run.schedule.keys.values():
            assert not (state.wanted or state.listed_wanted or state.ahead or state.listed_ahead)
            assert not (state.waiting or state.num_waiting or state.in_flight)


# ---- single properties ----------------------------------------------------------------------------------------------


def test_waiting_readers_are_served_in_order_and_before_any_work_ahead():
    schedule = schedule_of("a", "b")
    schedule.look_ahead("a", 0, 100, 3)
    for index in (9, 7, 8):
        schedule.ask("b", index)
    assert drained(schedule) == [("b", 7), ("b", 8), ("b", 9), ("a", 0), ("a", 1), ("a", 2)]


def test_work_ahead_ends_at_the_window_and_at_the_readers_end():
    schedule = schedule_of("a")
    schedule.look_ahead("a", 3, 1000, 4)
    schedule.look_ahead("a", 20, 22, 4)
    schedule.look_ahead("a", 30, 30, 4)
    schedule.look_ahead("a", 31, 30, 4)
    assert drained(schedule) == [("a", index) for index in (3, 4, 5, 6, 20, 21)]


def test_two_windows_that_overlap_are_made_once():
    schedule = schedule_of("a")
    for position in (0, 2, 1):
        schedule.look_ahead("a", position, 100, 4)
    schedule.ask("a", 3)
    assert sorted(drained(schedule)) == [("a", index) for index in range(6)]


def test_what_is_there_in_flight_or_failed_is_not_made():
    schedule = schedule_of("a", cached={0})
    for index in range(5):
        schedule.look_ahead("a", index, 5, 1)
        schedule.ask("a", index)
    assert [schedule.wants_reading("a", index) for index in range(5)] == [True, False, False, False, False]
    assert schedule.next_to_make() == ("a", 1)
    hold(schedule, "a", 2)
    schedule.fail("a", 3, "ValueError: no")
    assert drained(schedule) == [("a", 4)]


def test_a_failed_batch_is_never_made_again():
    schedule = schedule_of("a")
    schedule.ask("a", 0)
    assert schedule.next_to_make() == ("a", 0)
    schedule.fail("a", 0, "ValueError: no")
    schedule.stop_asking("a", 0)
    schedule.look_ahead("a", 0, 1, 4)
    schedule.ask("a", 0)
    assert schedule.keys["a"].errors == {0: "ValueError: no"}
    assert schedule.available("a", 0) and schedule.next_to_make() is None


def test_a_batch_whose_reader_has_gone_is_not_begun():
    schedule = schedule_of("a")
    for index in (0, 0, 1):
        schedule.ask("a", index)
    schedule.stop_asking("a", 1)
    schedule.stop_asking("a", 0)
    assert drained(schedule) == [("a", 0)]


def test_a_batch_asked_for_again_after_its_reader_had_gone_is_made():
    schedule = schedule_of("a")
    schedule.ask("a", 0)
    schedule.stop_asking("a", 0)
    assert schedule.next_to_make() is None
    schedule.ask("a", 0)
    assert schedule.next_to_make() == ("a", 0)


def test_a_shard_is_read_by_one_at_a_time_and_again_only_when_it_was_dropped():
    schedule = schedule_of("a", cached={0}, budget=SIZE)
    assert schedule.wants_reading("a", 0) and not schedule.wants_reading("a", 0)
    hold(schedule, "a", 0, fresh=False)
    assert not schedule.wants_reading("a", 0)
    hold(schedule, "a", 1)
    assert schedule.wants_reading("a", 0)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_damaged_shard_is_made_once_when_it_is_waited_for_or_ahead(waiting):
    schedule = schedule_of("a", cached={0})
    if waiting:
        schedule.ask("a", 0)
    assert schedule.wants_reading("a", 0) and schedule.next_to_make() is None
    schedule.not_there("a", 0)
    schedule.look_ahead("a", 0, 1, 1)
    assert not schedule.available("a", 0) and drained(schedule) == [("a", 0)]


def test_references_dropped_are_those_read_longest_ago():
    rng = random.Random(0)
    for _ in range(200):
        budget, recent = rng.randrange(0, 6), []
        schedule = schedule_of("a", "b", budget=budget * SIZE)
        for _ in range(40):
            job = rng.choice("ab"), rng.randrange(6)
            action = rng.choice(("hold", "ref", "hand_out", "forget"))
            if action == "hold":
                hold(schedule, *job)
            there = job in recent or action == "hold"
            if action in ("ref", "hand_out"):
                assert (getattr(schedule, action)(*job) is not None) == there
            if action == "forget":
                schedule.forget(*job)
            recent = [other for other in recent if other != job]
            recent += [job] if there and action != "forget" else []
            recent = recent[-max(1, budget) :]
            assert list(schedule.held) == recent and schedule.held_bytes == len(recent) * SIZE


def test_a_batch_larger_than_the_budget_is_held_alone():
    schedule = schedule_of("a", budget=3 * SIZE)
    for index in range(3):
        hold(schedule, "a", index)
    schedule.hold("a", 9, "large", 50 * SIZE, cached=True, fresh=True)
    assert list(schedule.held) == [("a", 9)] and schedule.held_bytes == 50 * SIZE
    hold(schedule, "a", 1)
    assert list(schedule.held) == [("a", 1)] and schedule.held_bytes == SIZE


def test_a_batch_held_again_counts_once():
    schedule = schedule_of("a")
    hold(schedule, "a", 0)
    schedule.hold("a", 0, "larger", 3 * SIZE, cached=True, fresh=False)
    assert schedule.held_bytes == 3 * SIZE and schedule.ref("a", 0) == "larger"


def test_a_batch_dropped_before_anyone_had_it_is_still_fresh_when_it_is_read():
    schedule = schedule_of("a", budget=SIZE)
    hold(schedule, "a", 0)
    hold(schedule, "a", 1)
    assert schedule.hand_out("a", 0) is None
    hold(schedule, "a", 0, fresh=False)
    assert schedule.hand_out("a", 0) == ("a0", False)
    assert schedule.hand_out("a", 0) == ("a0", True)


def test_the_queue_counts_batches_waited_for_that_nobody_makes_or_reads():
    schedule = schedule_of("a", "b", cached={7})
    for key, index in (("a", 0), ("a", 0), ("a", 1), ("b", 5), ("b", 7)):
        schedule.ask(key, index)
    schedule.look_ahead("a", 10, 20, 4)
    assert schedule.queue_depth == 4
    assert schedule.wants_reading("b", 7) and schedule.queue_depth == 3
    assert schedule.next_to_make() and schedule.queue_depth == 2
    schedule.stop_asking("b", 5)
    schedule.stop_asking("a", 0)
    schedule.stop_asking("a", 1)
    assert schedule.queue_depth == 0


# ---- slots between keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_keys", [2, 3, 5])
@pytest.mark.parametrize("slots", range(1, 12))
@pytest.mark.parametrize("how", ["wanted", "ahead"])
def test_keys_of_equal_demand_get_equal_shares_of_free_slots_within_one(num_keys, slots, how):
    keys = "abcde"[:num_keys]
    schedule = schedule_of(*keys)
    for key in keys:
        for index in range(20):
            if how == "wanted":
                schedule.ask(key, index)
            else:
                schedule.look_ahead(key, index, 20, 1)
    shares = Counter(dict.fromkeys(keys, 0)) + Counter(key for key, _ in drained(schedule, slots))
    counts = [shares[key] for key in keys]
    assert sum(counts) == slots and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("slots", [4, 8, 16])
def test_slots_follow_demand(slots):
    schedule = schedule_of("few", "many")
    for index in range(60):
        schedule.ask("many", index)
    for index in range(20):
        schedule.ask("few", index)
    shares = Counter(key for key, _ in drained(schedule, slots))
    assert shares["many"] == pytest.approx(0.75 * slots, abs=1) and shares["few"] >= 1


def test_an_index_is_listed_once_however_many_ask_for_it():
    schedule = schedule_of("a")
    for _ in range(10):
        schedule.ask("a", 0)
        schedule.look_ahead("a", 0, 1, 1)
    assert (schedule.keys["a"].wanted, schedule.keys["a"].ahead) == ([0], [0])
    assert drained(schedule) == [("a", 0)]


def serve(schedule: Schedule, key: str, begin: int, count: int, waiting: int = 1) -> None:
    """`count` batches are made and handed out in turn; so many are waited for at a time, and none in the end."""
    for index in range(begin, begin + waiting):
        schedule.ask(key, index)
    for index in range(begin, begin + count):
        assert schedule.next_to_make() == (key, index)
        hold(schedule, key, index)
        schedule.ask(key, index + waiting)
        schedule.stop_asking(key, index)
    for index in range(begin + count, begin + count + waiting):
        schedule.stop_asking(key, index)


def shares_of_the_next(schedule: Schedule, slots: int) -> Counter:
    return Counter(key for key, _ in drained(schedule, slots))


def test_a_key_that_comes_back_or_is_new_gets_its_share_and_no_more():
    schedule = schedule_of("old", "back", "new")
    serve(schedule, "back", 0, 5, waiting=100)
    serve(schedule, "old", 0, 1000, waiting=100)
    for key in schedule.keys:
        for index in range(2000, 2100):
            schedule.ask(key, index)
    shares = shares_of_the_next(schedule, 60)
    assert all(shares[key] == pytest.approx(20, abs=2) for key in schedule.keys)


def test_a_key_that_waited_for_its_shards_does_not_take_all_slots_afterwards():
    schedule = schedule_of("read", "made")
    schedule.keys["read"].cached = {0}
    schedule.ask("read", 0)
    assert schedule.wants_reading("read", 0)  # and while that is read, or the next reader's
    serve(schedule, "made", 0, 1000, waiting=500)
    for index in range(1, 501):
        schedule.ask("read", index)
        schedule.ask("made", 1000 + index)
    shares = shares_of_the_next(schedule, 40)  # the first 500 go to "read"
    assert shares["made"] >= 10


def test_a_key_that_only_looks_ahead_does_not_take_all_free_slots():
    schedule = schedule_of("new", "old")
    serve(schedule, "old", 0, 1000)
    schedule.look_ahead("new", 0, 400, 400)
    schedule.look_ahead("old", 1000, 1400, 400)
    shares = shares_of_the_next(schedule, 40)
    assert shares["old"] >= 10


def test_work_ahead_in_idle_slots_costs_a_key_nothing_later():
    schedule = schedule_of("ahead", "other")
    schedule.ask("other", 0)
    assert schedule.next_to_make() == ("other", 0)  # in flight: nobody waits for a slot
    schedule.look_ahead("ahead", 0, 50, 50)
    assert len(drained(schedule)) == 50
    for index in range(100, 500):
        schedule.ask("ahead", index)
        schedule.ask("other", index)
    shares = shares_of_the_next(schedule, 40)  # all go to "other", and so do the 360 after them
    assert shares["ahead"] >= 10


def served(slots: int, num_keys: int, rounds: int, waiting: int = 4) -> Counter:
    """Batches made per key while one reader of each always waits for the next few, and slots work in turn."""
    keys = [f"key{number}" for number in range(num_keys)]
    schedule, making, made = schedule_of(*keys), [], Counter(dict.fromkeys(keys, 0))
    for key in keys:
        for index in range(waiting):
            schedule.ask(key, index)
    for _ in range(rounds):
        while len(making) < slots:
            making.append(schedule.next_to_make())
        key, index = making.pop(0)
        hold(schedule, key, index)
        schedule.stop_asking(key, index)
        schedule.ask(key, made[key] + waiting)
        made[key] += 1
    return made


@pytest.mark.parametrize(("slots", "num_keys"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (5, 3)])
def test_no_key_starves_while_there_is_a_slot_for_each(slots, num_keys):
    made = served(slots, num_keys, rounds=300)
    assert min(made.values()) >= 300 // (2 * num_keys)


@pytest.mark.parametrize(("slots", "num_keys"), [(1, 2), (1, 5), (2, 3), (4, 8)])
def test_no_key_starves_where_there_are_more_keys_than_slots(slots, num_keys):
    assert min(served(slots, num_keys, rounds=100 * num_keys).values()) > 0


def test_a_key_with_more_readers_of_the_same_batches_gets_more_slots():
    schedule = schedule_of("few", "many")
    for index in range(8):
        schedule.ask("few", index)
        for _ in range(10):
            schedule.ask("many", index)
    shares = Counter(key for key, _ in drained(schedule, 8))
    assert shares["many"] > shares["few"]


# ---- what a decision costs: calls, not seconds -----------------------------------------------------------------------


class Counting(Schedule):
    """Counts how often it looks at an index and at a key."""

    def __init__(self, budget_bytes: int):
        super().__init__(budget_bytes)
        self.looks = Counter()

    def available(self, key: str, index: int) -> bool:
        self.looks["index"] += 1
        return super().available(key, index)

    def _tidy(self, key: str, state: Key, name: str) -> bool:
        self.looks["key"] += 1
        return super()._tidy(key, state, name)


def steps_of_a_reader(num_synthesizers: int, num_other_keys: int, num_steps: int = 50) -> Counter:
    """What it takes to read on by one batch, so many times, in a fleet that is ahead of its reader."""
    schedule = Counting(10**9)
    for key in ["read", *(f"other{number}" for number in range(num_other_keys))]:
        schedule.keys[key] = Key()
        schedule.ask(key, 0)
        schedule.stop_asking(key, 0)
    window = 2 * num_synthesizers
    schedule.look_ahead("read", 0, 10**6, window)
    drained(schedule, 2 * window)
    for index in range(window):
        hold(schedule, "read", index)
    schedule.looks.clear()
    for index in range(num_steps):
        assert schedule.hand_out("read", index)
        schedule.look_ahead("read", index, 10**6, window)
        while job := schedule.next_to_make():
            hold(schedule, *job)
    assert len(schedule.held) == window + num_steps - 1
    return schedule.looks


def test_reading_on_by_a_batch_costs_the_same_in_a_fleet_of_any_size():
    small, large = steps_of_a_reader(4, 0), steps_of_a_reader(4000, 0)
    assert small == large and small["index"] <= 50 * 4


def test_reading_on_by_a_batch_costs_the_same_beside_any_number_of_keys_that_want_nothing():
    assert steps_of_a_reader(4, 0) == steps_of_a_reader(4, 1000)


def test_a_window_across_pages_is_listed_whole_and_once():
    schedule = schedule_of("a")
    schedule.look_ahead("a", PAGE - 2, 10**6, 4)
    schedule.look_ahead("a", PAGE - 3, 10**6, PAGE + 4)
    assert drained(schedule, 10**5) == [("a", index) for index in range(PAGE - 3, 2 * PAGE + 1)]


@pytest.mark.parametrize("how", ["dropped", "lost", "not made"])
def test_a_batch_seen_by_a_window_and_then_lost_is_listed_again(how):
    schedule = schedule_of("a", budget=SIZE)
    schedule.look_ahead("a", 0, 1, 4)
    assert schedule.next_to_make() == ("a", 0)
    if how == "not made":
        schedule.not_there("a", 0)
    else:
        hold(schedule, "a", 0, cached=False)
        schedule.look_ahead("a", 0, 1, 4)
        assert schedule.next_to_make() is None
        hold(schedule, "a", 1) if how == "dropped" else schedule.forget("a", 0)
    schedule.look_ahead("a", 0, 1, 4)
    assert schedule.next_to_make() == ("a", 0)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_heaps_stay_short_while_readers_come_and_go_and_slots_work():
    rng, length = random.Random(1), 50
    schedule, longest = schedule_of("a", budget=SIZE), 0
    for _ in range(5_000):
        index = rng.randrange(length)
        schedule.ask("a", index)
        schedule.look_ahead("a", index, length, 4)
        schedule.stop_asking("a", index)
        job = schedule.next_to_make()
        if job:
            schedule.not_there(*job)
        state = schedule.keys["a"]
        longest = max(longest, len(state.wanted) + len(state.ahead))
        assert len(state.listed_wanted) <= length and len(state.listed_ahead) <= length
    assert longest <= 3 * length


def test_heaps_stay_short_while_readers_ask_again_and_no_slot_is_free():
    schedule = schedule_of("a")
    for _ in range(10_000):
        schedule.ask("a", 0)
        schedule.stop_asking("a", 0)
    assert len(schedule.keys["a"].wanted) <= 10


# ---- what stalled once, or was made for nobody -----------------------------------------------------------------------


def test_readers_that_wake_late_get_everything_without_a_cache():
    for seed in SEEDS:
        Simulation(World(late=True, budget=2, with_cache=False, timeouts=0.2, num_readers=8), seed).run()


def test_a_batch_dropped_before_its_reader_woke_is_made_again():
    schedule = schedule_of("a", budget=SIZE)
    schedule.ask("a", 0)  # the first reader
    assert schedule.next_to_make() == ("a", 0)
    hold(schedule, "a", 0, cached=False)  # the reader is told, and comes to it a few turns of the loop later
    hold(schedule, "a", 1, cached=False)  # beyond the budget: 0 goes
    schedule.ask("a", 0)  # a second reader
    schedule.stop_asking("a", 0)  # the first one wakes
    assert schedule.hand_out("a", 0) is None
    schedule.ask("a", 0)  # and asks again
    assert schedule.next_to_make() == ("a", 0)


def test_a_batch_reported_lost_before_its_reader_woke_is_made_again():
    schedule = schedule_of("a")
    schedule.ask("a", 0)
    assert schedule.next_to_make() == ("a", 0)
    hold(schedule, "a", 0, cached=False)
    schedule.forget("a", 0)  # another reader had an older copy, and lost that
    schedule.ask("a", 0)
    assert schedule.next_to_make() == ("a", 0)


def test_a_batch_that_was_read_and_dropped_is_not_made_again_for_nobody():
    schedule = schedule_of("a", budget=SIZE)
    schedule.look_ahead("a", 0, 1, 1)
    schedule.ask("a", 0)
    assert schedule.next_to_make() == ("a", 0)
    hold(schedule, "a", 0, cached=False)
    schedule.stop_asking("a", 0)
    assert schedule.hand_out("a", 0) == ("a0", False)
    hold(schedule, "a", 1, cached=False)  # beyond the budget: 0 goes
    assert schedule.next_to_make() is None


def test_a_batch_whose_maker_died_after_its_reader_had_gone_is_not_made_again():
    schedule = schedule_of("a")
    schedule.ask("a", 0)
    assert schedule.next_to_make() == ("a", 0)
    schedule.stop_asking("a", 0)
    schedule.not_there("a", 0)
    assert schedule.next_to_make() is None
