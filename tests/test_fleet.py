"""The fleet on one machine, with simulated synthesizers: order, sharing, memory, faults, deadlines."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import RayError

from dfkd_ray import cache, fleet
from dfkd_ray.fleet.coordinator import Coordinator
from dfkd_ray.fleet.pool import Pool, Worker
from dfkd_ray.fleet.schedule import Key, Schedule
from dfkd_ray.fleet.simulated import NUMERICS, Simulated, simulated_batch, simulated_spec
from dfkd_ray.fleet.stream import Stream, error_of

SHAPE = (4, 1, 8, 8)


def status_of(running: fleet.Fleet) -> dict:
    """What a fleet whose coordinator is there says of itself."""
    status = running.status()
    assert status is not None
    return status


@pytest.fixture(scope="module", autouse=True)
def ray_session():
    """One Ray session for this file, its object store small, its workers free to import from here."""
    with fleet.connected(num_cpus=4, object_store_memory=100_000_000):
        yield


def settings_of(root: Path | None = None, **changes) -> fleet.Settings:
    values = {"num_synthesizers": 1, "cpus": 0.1, "make": Simulated, "device": "cpu"}
    return fleet.Settings(cache_root=None if root is None else str(root), **values | changes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[fleet.Fleet]:
    """A fleet of two synthesizers for all tests that leave it as it is."""

    class Faulty(Simulated):
        """It knows whether its process began with torch, and fails over some batches of the keys `fails` and `disk`."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.has_torch = "torch" in sys.modules

        async def hello(self):
            return {**await super().hello(), "torch": self.has_torch}

        async def batch(self, key, index):
            name = self.specs[key].config["name"] if key in self.specs else None
            if (name, index) == ("fails", 3):
                raise FloatingPointError("the loss is nan at step 25")
            marker = Path(f"{self.cache_root}-error-{index}")
            if name == "disk" and (index == 5 or (index == 2 and not marker.exists())):
                marker.touch()
                raise OSError(28, "No space left on device")
            return await super().batch(key, index)

    with fleet.started(
        settings_of(tmp_path_factory.mktemp("shared") / "cache", num_synthesizers=2, make=Faulty)
    ) as one:
        yield one


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Iterator[fleet.Fleet]:
    """A fleet of one synthesizer that makes few batches ahead and keeps few in memory."""
    settings = settings_of(tmp_path_factory.mktemp("narrow"), window=5, budget_bytes=1_000_000)
    with fleet.started(settings) as one:
        yield one


def root_of(running: fleet.Fleet) -> str:
    """Its cache."""
    assert running.settings.cache_root is not None
    return running.settings.cache_root


def assert_is(batch, spec, index):
    wanted = simulated_batch(spec.key, index, spec.config)
    assert (batch.index, batch.key) == (index, spec.key)
    np.testing.assert_array_equal(batch.images, wanted.images)
    np.testing.assert_array_equal(batch.labels, wanted.labels)


def read_all(stream: Stream, spec, indices) -> list[bool]:
    """Read and check; returns which were found."""
    founds = []
    for index, (batch, found) in zip(indices, stream.batches(spec, indices), strict=True):
        assert_is(batch, spec, index)
        founds.append(found)
    return founds


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def gone(pids, seconds: float = 600.0) -> bool:
    """Whether all processes end within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_batches_come_in_the_order_asked_for_and_are_made_once_for_all_readers(shared):
    spec, before = simulated_spec("order", SHAPE, (0.0, 0.02)), status_of(shared)
    founds: dict[int, list[bool]] = {}

    def reader(number: int, pause: float) -> None:
        stream, indices = shared.stream(in_flight=1 + number), list(range(40))
        if number == 2:
            indices = indices[::-1]
        for index, (batch, found) in zip(indices, stream.batches(spec, indices), strict=True):
            assert_is(batch, spec, index)
            founds.setdefault(number, []).append(found)
            time.sleep(pause)

    threads = [threading.Thread(target=reader, args=(number, pause)) for number, pause in enumerate((0, 0.01, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=900)
    assert [len(founds[number]) for number in range(3)] == [40, 40, 40]
    status = status_of(shared)
    assert status["made"] - before["made"] == 40 and status["images"] - before["images"] == 160
    assert sum(not found for own in founds.values() for found in own) == 40, "each was new to one reader only"
    assert read_all(shared.stream(), spec, [3, 3, 0, 3]) == [True] * 4
    assert shared.stream().batches(spec, []) is not None and status_of(shared)["made"] == status["made"]
    assert cache.indices(cache.folder_of(root_of(shared), spec.key, NUMERICS)) == set(range(40))


def test_no_more_than_a_window_is_made_ahead_of_a_reader_that_stops(narrow):
    spec, before = simulated_spec("window", SHAPE, (0.0, 0.01)), status_of(narrow)["made"]
    source = narrow.stream(in_flight=2).batches(spec, range(1000))
    for _ in range(3):
        next(source)
    made = -1
    while status_of(narrow)["made"] != made or status_of(narrow)["queue_depth"]:  # until it stands still
        made = status_of(narrow)["made"]
        time.sleep(1.0)
    assert made - before <= 3 + 2 + 5 + 1


def test_free_slots_are_given_out_without_a_look_at_the_whole_fleet(monkeypatch):
    class Counting(Schedule):
        asked = 0

        def next_to_make(self):
            self.asked += 1
            return super().next_to_make()

    given, coordinator = [], object.__new__(Coordinator)  # its decisions alone: no actor
    coordinator.pool, coordinator.schedule = object.__new__(Pool), Counting(10**6)
    coordinator.pool.settings, coordinator.pool.free = settings_of(slots=2), {}
    coordinator.readers, coordinator.to_read, coordinator.num_reading = {}, [], 0
    monkeypatch.setattr(coordinator, "spawn", lambda job: None, raising=False)
    monkeypatch.setattr(coordinator, "make_batch", lambda worker, _key, index: given.append((worker.number, index)))
    workers = [Worker(f"synthesizer {number}", None, number, up=number != 1) for number in range(1000)]
    for worker in reversed(workers):
        coordinator.pool.offer(worker)
        coordinator.pool.offer(worker)
    coordinator.pump()
    assert (coordinator.schedule.asked, given) == (1, []), "nothing to make: one look, however many are idle"
    coordinator.schedule.keys["key"] = Key()
    coordinator.schedule.look_ahead("key", 0, 5, 5)
    coordinator.pump()
    assert given == [(0, 0), (0, 1), (2, 2), (2, 3), (3, 4)], "the first of the fleet first, none that is down"
    workers[0].busy, workers[1].up = 1, True
    coordinator.pool.offer(workers[0])
    coordinator.pool.offer(workers[1])
    coordinator.schedule.look_ahead("key", 5, 9, 4)
    coordinator.pump()
    assert given[5:] == [(0, 5), (1, 6), (1, 7), (3, 8)]
    workers[900].node = "there"
    coordinator.pool.offer(workers[900])
    coordinator.readers["key", 9] = "there"
    coordinator.schedule.look_ahead("key", 9, 11, 2)
    coordinator.pump()
    assert given[9:] == [(900, 9), (4, 10)], "a batch is made where its reader waits, if somebody is free there"
    assert len(coordinator.pool.free[""]) == 996 and all(worker.busy <= 2 for worker in workers)


def test_two_keys_share_the_fleet_fairly(shared):
    specs = [simulated_spec(f"fair {number}", SHAPE, (0.05, 0.05)) for number in range(2)]
    counts, others = [0, 0], []

    def reader(number: int) -> None:
        for batch, _ in shared.stream().batches(specs[number], range(20)):
            assert_is(batch, specs[number], batch.index)
            counts[number] += 1
        others.append(counts[1 - number])

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=900)
    assert counts == [20, 20] and others[0] >= 10, "neither waits for the other to end"


def test_killed_synthesizers_and_coordinators_change_no_batch_and_stop_nobody(tmp_path):
    spec, rng, over = simulated_spec("kills", SHAPE, (0.05, 0.15)), random.Random(0), threading.Event()
    with fleet.started(settings_of(tmp_path, num_synthesizers=2)) as running, ThreadPoolExecutor() as pool:

        def read() -> int:
            stream, num_read = running.stream(timeout_s=900.0), 0
            while not over.is_set():  # as long as it takes for all kills
                read_all(stream, spec, range(num_read, num_read + 20))
                num_read += 20
            return num_read

        readers, victims = [pool.submit(read) for _ in range(2)], ["synthesizer", "coordinator"] * 2
        try:
            while victims:
                time.sleep(rng.uniform(0.2, 0.8))
                with suppress(RayError):
                    actors = ray.get(running.coordinator.actors.remote(), timeout=5)
                    one = running.coordinator if victims[0] == "coordinator" else rng.choice(actors)
                    ray.kill(one, no_restart=False)
                    del victims[0]
        finally:
            over.set()
        num_read = max(reader.result() for reader in readers)
        assert read_all(running.stream(), spec, range(num_read)) == [True] * num_read
    assert cache.indices(cache.folder_of(tmp_path, spec.key, NUMERICS)) >= set(range(num_read))


def test_a_synthesizer_that_hangs_loses_its_batch_to_another(tmp_path):
    class Hanging(Simulated):
        async def batch(self, key, index):
            if index == 2 and not (tmp_path / "hung").exists():
                (tmp_path / "hung").touch()
                time.sleep(600)
            return await super().batch(key, index)

    spec = simulated_spec("hang", SHAPE)
    with fleet.started(
        settings_of(tmp_path / "cache", num_synthesizers=2, make=Hanging, batch_timeout_s=5.0)
    ) as running:
        read_all(running.stream(timeout_s=900.0), spec, range(6))
        assert status_of(running)["deaths"] == 1


def test_a_batch_over_which_every_synthesizer_hangs_fails_with_advice(tmp_path):
    spec = simulated_spec("always hangs", SHAPE, (300.0, 300.0))
    with (
        fleet.started(settings_of(tmp_path, batch_timeout_s=0.5)) as running,
        pytest.raises(TimeoutError, match=r"no batch within 0.5 s, 3 times; raise `batch_timeout`"),
    ):
        read_all(running.stream(timeout_s=900.0), spec, [0])


def test_a_batch_that_cannot_be_made_tells_its_readers_why_and_no_other(shared):
    spec = simulated_spec("fails", SHAPE)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"batch 3 of synthesis .*the loss is nan"):
            read_all(shared.stream(), spec, range(8))
    read_all(shared.stream(), spec, [0, 1, 2, 4, 5])


def test_a_disk_error_that_passes_is_not_noticed_and_one_that_stays_is_told(shared):
    spec = simulated_spec("disk", SHAPE)
    read_all(shared.stream(), spec, range(5))
    with pytest.raises(OSError, match="No space left"):
        read_all(shared.stream(), spec, [5])


def test_a_cache_that_is_full_when_a_key_is_opened_is_told_and_named(tmp_path):
    (tmp_path / "small").mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path / "small")]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("a disk that is small and full needs leave to mount one")
    try:
        spec = simulated_spec("full", SHAPE)
        with fleet.started(settings_of(tmp_path / "small")) as running:
            with (tmp_path / "small" / "others").open("wb", buffering=0) as file, pytest.raises(OSError):
                while file.write(bytes(4096)):
                    pass
            with pytest.raises(OSError, match=f"the cache {tmp_path / 'small'}/.*: No space left on device"):
                read_all(running.stream(), spec, [0])
            (tmp_path / "small" / "others").unlink()
            read_all(running.stream(), simulated_spec("room", SHAPE), [0])
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)


def test_a_damaged_shard_is_made_again(shared):
    spec = simulated_spec("damage", SHAPE)
    read_all(shared.stream(), spec, range(6))
    path = cache.folder_of(root_of(shared), spec.key, NUMERICS).path / cache.name_of(4)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with fleet.started(settings_of(Path(root_of(shared)))) as running:
        founds = read_all(running.stream(), spec, range(6))
        assert founds == [True] * 4 + [False] + [True]
        status = status_of(running)
        assert (status["made"], status["damaged"], status["read"]) == (1, 1, 5)
    assert path.read_bytes() == content


def test_beyond_the_budget_batches_are_read_again_from_the_cache(narrow):
    spec, before = simulated_spec("budget", (64, 1, 64, 64)), status_of(narrow)  # 262 kB and its labels
    for _ in range(2):
        read_all(narrow.stream(), spec, range(20))
        assert status_of(narrow)["held_bytes"] <= 1_000_000
    status = status_of(narrow)
    assert status["made"] - before["made"] == 20 and status["read"] - before["read"] >= 17


def test_more_than_the_object_store_holds_passes_through_it(tmp_path):
    spec = simulated_spec("full store", (64, 3, 224, 224))  # 9.6 MB a batch, 10 fit
    with fleet.started(settings_of(tmp_path, budget_bytes=10**9)) as running:
        read_all(running.stream(), spec, range(20))
        assert status_of(running)["made"] == 20


def test_a_write_into_a_shared_batch_is_refused(shared):
    spec = simulated_spec("read-only", SHAPE)
    [(batch, _)] = shared.stream().batches(spec, [1])
    with pytest.raises(ValueError, match="read-only"):
        batch.images[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        batch.images.flags.writeable = True
    from dfkd_ray.images import PixelSpace, decode

    decode(batch.images, PixelSpace((0.5,), (0.5,))).zero_()
    assert_is(next(shared.stream().batches(spec, [1]))[0], spec, 1)


def test_a_batch_is_read_without_a_copy(shared):
    import tracemalloc

    spec = simulated_spec("no copy", (64, 3, 224, 224))
    size = 64 * 3 * 224 * 224
    read_all(shared.stream(), spec, range(4))
    stream = shared.stream()
    tracemalloc.start()  # numpy's allocations are traced
    held = [batch for batch, _ in stream.batches(spec, range(4))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2 and len(held) == 4


def test_without_any_synthesizer_a_reader_makes_its_batches_itself(tmp_path):
    class Mortal(Simulated):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if (tmp_path / "plague").exists():
                raise RuntimeError("no such device")

    spec = simulated_spec("alone", SHAPE)
    with fleet.started(settings_of(tmp_path / "cache", make=Mortal)) as running:
        read_all(running.stream(), spec, range(2))
        (tmp_path / "plague").touch()
        for actor in ray.get(running.coordinator.actors.remote()):
            ray.kill(actor, no_restart=False)
            with pytest.raises(RayError):  # until it is gone, it may make a batch
                while True:
                    ray.get(actor.__ray_ready__.remote(), timeout=60)
        stream = running.stream(alone_s=1.0, timeout_s=900.0)
        source = stream.batches(spec, range(4), lambda index: simulated_batch(spec.key, index, spec.config))
        for index, (batch, _) in enumerate(source):
            assert_is(batch, spec, index)
        assert stream.num_alone == 2
        with pytest.raises(
            TimeoutError, match=r"batch 9 of synthesis .* waiting for a synthesizer to start \(0.1 CPUs"
        ):
            next(running.stream(timeout_s=0.5, alone_s=1e9).batches(spec, [9]))
        (tmp_path / "plague").unlink()
        read_all(running.stream(timeout_s=900.0), spec, range(4, 6))


def test_a_wait_has_a_deadline_and_says_what_it_waits_for(tmp_path):
    spec = simulated_spec("slow", SHAPE, (300.0, 300.0))
    with fleet.started(settings_of(tmp_path)) as running:
        stream = running.stream(timeout_s=5.0)
        with pytest.raises(TimeoutError, match=r"batch 0 .* synthesizer \d has been making it for \d+ s"):
            next(stream.batches(spec, [0]))


def test_a_fleet_that_does_not_fit_is_refused_with_numbers():
    refused = pytest.raises(
        OSError, match=r"1 synthesizers of 64 CPUs and 0 GPUs could not be reserved within 1 s; free"
    )
    with refused, fleet.started(settings_of(num_synthesizers=1, cpus=64.0), start_s=1.0):
        pass


def test_a_synthesizer_that_cannot_start_says_why():
    class Broken(Simulated):
        def __init__(self, *arguments):
            raise ValueError("device cuda: this torch sees no CUDA device")

    with pytest.raises(OSError, match="no CUDA device"), fleet.started(settings_of(make=Broken)):
        pass


def test_synthesizers_of_another_numerics_class_are_left_out(tmp_path):
    class Other(Simulated):
        async def hello(self):
            first = not (tmp_path / "first").exists()
            (tmp_path / "first").touch()
            return {**await super().hello(), "numerics": "one" if first else "another"}

    with fleet.started(settings_of(num_synthesizers=2, make=Other)) as running:
        end = time.monotonic() + 600
        while "left out" not in str(status_of(running)["trouble"]) and time.monotonic() < end:
            time.sleep(0.2)
        status = status_of(running)
        own = status["numerics"]  # of whichever answer came first
        (other,) = {"one", "another"} - {own}
        assert status["synthesizers_up"] == 1
        assert list(status["trouble"].values()) == [f"left out: it computes as {other}, the fleet as {own}"]
        read_all(running.stream(), simulated_spec("mixed", SHAPE), range(3))


def test_no_process_and_no_reservation_is_left_behind(shared, narrow, tmp_path):
    others = [one.settings.num_synthesizers * one.settings.cpus for one in (shared, narrow)]
    num_free = pytest.approx(ray.cluster_resources()["CPU"] - sum(others))
    with fleet.started(settings_of(tmp_path, num_synthesizers=2)) as running:
        read_all(running.stream(), simulated_spec("end", SHAPE), range(3))
        actors = ray.get(running.coordinator.actors.remote())
        pids = [hello["pid"] for hello in ray.get([actor.hello.remote() for actor in actors])]
        assert all(alive(pid) for pid in pids)
    assert gone(pids)
    end = time.monotonic() + 600
    while ray.available_resources().get("CPU") != num_free and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == num_free


def test_the_coordinator_and_its_synthesizers_start_without_torch(shared):
    actors = ray.get(shared.coordinator.actors.remote())
    assert [hello["torch"] for hello in ray.get([actor.hello.remote() for actor in actors])] == [False] * 2


def test_errors_come_back_as_their_own_kind():
    assert isinstance(error_of("FloatingPointError: x", "k" * 64, 1), FloatingPointError)
    assert isinstance(error_of("OutOfMemoryError: CUDA", "k" * 64, 1), MemoryError)
    other = error_of("Strange: x", "k" * 64, 1)
    assert type(other) is RuntimeError and "batch 1" in str(other)


def test_waiting_and_calling_are_counted_apart(shared):
    spec = simulated_spec("counted", SHAPE, (0.4, 0.4))
    stream = shared.stream(in_flight=1)
    read_all(stream, spec, range(5))
    assert stream.wait_s > 0.8 and stream.call_s < stream.wait_s
    again = shared.stream()
    read_all(again, spec, range(5))
    assert again.wait_s < 0.3
