import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dfkd_ray import cache
from dfkd_ray.batches import Batch

KEY = "0123456789abcdef" * 4
TERMS = {"bn": 1.25, "seconds": 0.5, "histogram": [1, 2], "label": float("nan")}


def make(index, key=KEY):
    """A batch that is a function of its index."""
    rng = np.random.default_rng(index)
    images = rng.integers(0, 256, (4, 1, 6, 6), dtype=np.uint8)
    return Batch(index, images, rng.integers(0, 10, 4), key, {"index": index})


def assert_equal(batch, other):
    assert (batch.index, batch.key) == (other.index, other.key)
    for one, two in ((batch.images, other.images), (batch.labels, other.labels)):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


class Counted:
    """`make`, and the indices it was asked for."""

    def __init__(self):
        self.indices = []

    def __call__(self, index):
        self.indices.append(index)
        return make(index)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_a_written_batch_is_read_back_bit_for_bit(tmp_path, dtype):
    images = np.random.default_rng(0).normal(100, 50, (3, 2, 5, 5)).astype(dtype)
    batch = Batch(12, images, np.array([3, -1, 9]), KEY, TERMS)
    cache.write(tmp_path, batch)
    found = cache.read(tmp_path, 12, KEY)
    assert_equal(found, batch)
    assert repr(found.terms) == repr(TERMS)


def test_a_strided_array_is_written_by_value(tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32).transpose(0, 3, 1, 2)[:, :, ::-1]
    batch = Batch(0, images, np.arange(4)[::2], KEY)
    cache.write(tmp_path, batch)
    assert_equal(cache.read(tmp_path, 0, KEY), batch)


def test_a_batch_is_made_once_and_then_found(tmp_path):
    counted, told = Counted(), []

    def on_batch(batch, was_cached):
        told.append((batch.index, was_cached))

    first = cache.fetch(range(3), KEY, counted, tmp_path, on_batch)
    again = cache.fetch(range(4), KEY, counted, tmp_path, on_batch)
    assert counted.indices == [0, 1, 2, 3]
    assert told == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True), (3, False)]
    for one, two in zip(first, again[:3], strict=True):
        assert_equal(one, two)


def test_batches_come_in_the_order_asked_for(tmp_path):
    cache.fetch([1], KEY, make, tmp_path)
    assert [batch.index for batch in cache.fetch([5, 1, 3], KEY, make, tmp_path)] == [5, 1, 3]


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_asked_for_twice_comes_twice(tmp_path, monkeypatch, cached):
    def no_waiting(seconds):
        raise AssertionError("waits for a batch that it already has")

    monkeypatch.setattr(cache.time, "sleep", no_waiting)
    batches = cache.fetch([2, 2, 0], KEY, make, tmp_path if cached else None)
    assert [batch.index for batch in batches] == [2, 2, 0]


def test_without_a_folder_batches_are_made_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counted = Counted()
    for _ in range(2):
        cache.fetch(range(2), KEY, counted, None)
    assert counted.indices == [0, 1, 0, 1] and list(tmp_path.iterdir()) == []


def test_a_batch_that_appears_just_before_the_lock_is_taken_is_not_made_again(tmp_path, monkeypatch):
    real, counted = cache.read, Counted()

    def read_too_early(folder, index, key):
        monkeypatch.setattr(cache, "read", real)
        cache.write(folder, make(index))
        return None

    monkeypatch.setattr(cache, "read", read_too_early)
    batch, cached = cache.obtain(0, KEY, counted, tmp_path)
    assert cached and counted.indices == []
    assert_equal(batch, make(0))


def test_no_batch_asked_for_is_no_batch(tmp_path):
    assert cache.fetch([], KEY, make, tmp_path) == []


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "header_only": lambda path: os.truncate(path, 8),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one_byte_short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one_bit": flip_last_bit,
    "garbage": lambda path: path.write_bytes(b"\xff" * 5000),
    "of_another_index_and_key": lambda path: (
        cache.write(path.parent / "other", make(1, "f" * 64)),
        shutil.copy(path.parent / "other" / path.name, path),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_batch_cache_remakes_a_damaged_file(tmp_path, damage):
    cache.fetch(range(3), KEY, make, tmp_path)
    DAMAGE[damage](cache.path_of(tmp_path, 1))
    counted = Counted()
    batches = cache.fetch(range(3), KEY, counted, tmp_path)
    assert counted.indices == [1]
    for index, batch in enumerate(batches):
        assert_equal(batch, make(index))
    assert cache.read(tmp_path, 1, KEY) is not None


def test_no_damaged_byte_of_the_header_is_served_or_stops_a_run(tmp_path):
    batch = make(0)
    cache.write(tmp_path, batch)
    path = cache.path_of(tmp_path, 0)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    raised, served = {}, {}
    for position in range(size):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x15]) + content[position + 1 :])
        try:
            found = cache.read(tmp_path, 0, KEY)
        except Exception as error:  # noqa: BLE001 - collected and asserted on: none may escape, of any type
            raised[position] = repr(error)
            continue
        if found is not None:
            assert_equal(found, batch)
            if found.terms != batch.terms:
                served[position] = found.terms
    assert (raised, served) == ({}, {})


def test_a_file_of_another_key_is_not_served(tmp_path):
    cache.write(tmp_path, make(0))
    assert cache.read(tmp_path, 0, "f" * 64) is None


def test_a_missing_batch_is_none(tmp_path):
    assert cache.read(tmp_path / "nowhere", 0, KEY) is None


def test_keys_and_numerics_classes_have_folders_of_their_own(tmp_path):
    folders = {cache.folder_of(tmp_path, key, kind) for key in (KEY, "f" * 64) for kind in ("cpu A", "cpu B", "gpu")}
    assert len(folders) == 6 and all(folder.parent == tmp_path for folder in folders)
    assert cache.folder_of(tmp_path, KEY, "cpu A") in folders


def test_the_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DFKD_RAY_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.default_folder() == Path("/a")
    monkeypatch.setenv("DFKD_RAY_CACHE", "")
    assert cache.default_folder() == Path("/b/dfkd_ray")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "dfkd_ray"


def test_a_full_disk_leaves_no_part_of_a_batch(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            cache.fetch([0], KEY, make, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == []
    assert_equal(cache.fetch([0], KEY, make, tmp_path)[0], make(0))


def test_an_error_while_making_leaves_the_batch_to_the_next(tmp_path):
    def fails(index):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fetch([0], KEY, fails, tmp_path)
    assert_equal(cache.fetch([0], KEY, make, tmp_path)[0], make(0))


# Another process on the same folder. It waits for a line before it starts; "slow" stops for ever in its first batch.
CHILD = """
import os, sys, time
from pathlib import Path
import numpy as np
from dfkd_ray import cache
from dfkd_ray.batches import Batch
folder, mode = Path(sys.argv[1]), sys.argv[2]
def make(index):
    with (folder / "made").open("a") as file:
        file.write(f"{index} child\\n")
    print("making", flush=True)
    time.sleep(600 if mode == "slow" else 0.1)
    return Batch(index, np.full((2, 1, 2, 2), index, np.uint8), np.zeros(2, np.int64), "ab" * 32)
print("ready", flush=True)
sys.stdin.readline()
batches = cache.fetch(range(6), "ab" * 32, make, folder)
print([int(batch.images.max()) for batch in batches], flush=True)
"""


@pytest.fixture
def child(tmp_path):
    """Start the other process; it is gone when the test ends."""
    started = []

    def start(mode):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def make_here(folder, seconds):
    def make(index):
        with (folder / "made").open("a") as file:
            file.write(f"{index} parent\n")
        cache.time.sleep(seconds)
        return Batch(index, np.full((2, 1, 2, 2), index, np.uint8), np.zeros(2, np.int64), "ab" * 32)

    return make


def test_two_processes_sharing_a_key_make_each_batch_once(tmp_path, child):
    process = child("quick")
    assert process.stdout.readline() == "making\n"
    batches = cache.fetch(range(6), "ab" * 32, make_here(tmp_path, 0.1), tmp_path)
    output, _ = process.communicate(timeout=60)
    made = [line.split() for line in (tmp_path / "made").read_text().splitlines()]
    assert sorted(int(index) for index, _ in made) == list(range(6))
    assert {who for _, who in made} == {"parent", "child"}
    assert [int(batch.images.max()) for batch in batches] == list(range(6))
    assert output.splitlines()[-1] == "[0, 1, 2, 3, 4, 5]"


def test_a_killed_maker_blocks_nobody(tmp_path, child):
    process = child("slow")
    assert process.stdout.readline() == "making\n"
    assert cache.obtain(0, "ab" * 32, make_here(tmp_path, 0), tmp_path) == (None, False)
    process.kill()
    process.wait()
    batches = cache.fetch(range(2), "ab" * 32, make_here(tmp_path, 0), tmp_path)
    assert [int(batch.images.max()) for batch in batches] == [0, 1]
    assert (tmp_path / "made").read_text().splitlines() == ["0 child", "0 parent", "1 parent"]
