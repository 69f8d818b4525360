import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest

import dfkd_ray
from dfkd_ray import cache, cache_entries, storage
from dfkd_ray.batches import Batch
from folders import content, put_back, remove_everything

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


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    """An empty cache, on each kind of file system."""
    where = tmp_path / "cache" if request.param == "disk" else f"fsspec+memory://{uuid.uuid4().hex}/cache"
    folder = storage.folder(where)
    yield folder
    remove_everything(folder)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_a_written_batch_is_read_back_bit_for_bit(root, dtype):
    images = np.random.default_rng(0).normal(100, 50, (3, 2, 5, 5)).astype(dtype)
    batch = Batch(12, images, np.array([3, -1, 9]), KEY, TERMS)
    cache.write(root, batch)
    found = cache.read(root, 12, KEY)
    assert found is not None
    assert_equal(found, batch)
    assert repr(found.terms) == repr(TERMS)


def test_a_strided_array_is_written_by_value(root):
    images = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32).transpose(0, 3, 1, 2)[:, :, ::-1]
    batch = Batch(0, images, np.arange(4)[::2], KEY)
    cache.write(root, batch)
    assert_equal(cache.read(root, 0, KEY), batch)


def test_a_batch_is_made_once_and_then_found(root):
    counted = Counted()
    told = [(batch.index, cached) for num in (3, 4) for batch, cached in cache.fetched(range(num), KEY, counted, root)]
    first, again = (cache.fetch(range(num), KEY, counted, root) for num in (3, 4))
    assert counted.indices == [0, 1, 2, 3]
    assert told == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True), (3, False)]
    for one, two in zip(first, again[:3], strict=True):
        assert_equal(one, two)


def test_what_a_batch_contributes_is_kept_with_it_and_damage_to_it_is_noticed(root):
    parts = {"gradient": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.asarray(3.0)}
    batch = Batch(0, make(0).images, make(0).labels, KEY, {"bn": 1.0}, parts)
    cache.write(root, batch)
    found = cache.read(root, 0, KEY)
    assert found is not None and list(found.contribution) == ["count", "gradient"]
    for name, array in parts.items():
        assert np.array_equal(found.contribution[name], array) and found.contribution[name].dtype == array.dtype
        assert found.contribution[name].shape == array.shape
    data = storage.folder(root).read(cache.name_of(0))
    assert data is not None
    storage.folder(root).write(cache.name_of(0), data[:-1] + bytes([data[-1] ^ 1]))
    assert cache.read(root, 0, KEY) is None


def test_batches_come_in_the_order_asked_for(root):
    cache.fetch([1], KEY, make, root)
    assert [batch.index for batch in cache.fetch([5, 1, 3], KEY, make, root)] == [5, 1, 3]


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_asked_for_twice_comes_twice(root, monkeypatch, cached):
    def no_waiting(seconds):
        raise AssertionError("waits for a batch that it already has")

    monkeypatch.setattr(cache.time, "sleep", no_waiting)
    batches = cache.fetch([2, 2, 0], KEY, make, root if cached else None)
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


def test_no_batch_asked_for_is_no_batch(root):
    assert cache.fetch([], KEY, make, root) == []


def with_header(data, change):
    """A shard with another header: damage that is still well-formed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def shard_of(batch):
    """The bytes that are written for a batch."""
    folder = storage.folder(f"fsspec+memory://{uuid.uuid4().hex}")
    cache.write(folder, batch)
    data = content(folder, cache.name_of(batch.index))
    remove_everything(folder)
    return data


DAMAGE = {
    "empty": lambda data: b"",
    "header_size_only": lambda data: data[:8],
    "half": lambda data: data[: len(data) // 2],
    "one_byte_short": lambda data: data[:-1],
    "one_byte_long": lambda data: data + b"\0",
    "one_bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "garbage": lambda data: b"\xff" * 5000,
    "endless_nesting": lambda data: (100000).to_bytes(8, "little") + b"[" * 100000,
    "header_of_a_list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "header_of_a_text": lambda data: (8).to_bytes(8, "little") + b'"images"',
    "no_images": lambda data: with_header(data, lambda header: header.pop("images")),
    "no_metadata": lambda data: with_header(data, lambda header: header.pop("__metadata__")),
    "metadata_of_a_number": lambda data: with_header(data, lambda header: header.update(__metadata__=1)),
    "another_type": lambda data: with_header(data, lambda header: header["images"].update(dtype="I8")),
    "unknown_type": lambda data: with_header(data, lambda header: header["images"].update(dtype=["U8"])),
    "another_shape": lambda data: with_header(data, lambda header: header["images"]["shape"].reverse()),
    "negative_shape": lambda data: with_header(data, lambda header: header["images"].update(shape=[-4, -1, 6, 6])),
    "vast_empty_shape": lambda data: with_header(
        data, lambda header: header["images"].update(shape=[0, 10**30], data_offsets=[0, 0])
    ),
    "shape_of_a_text": lambda data: with_header(data, lambda header: header["images"].update(shape="4166")),
    "offsets_beyond_the_end": lambda data: with_header(
        data, lambda header: header["images"].update(data_offsets=[10**6, 10**6 + 144])
    ),
    "one_offset": lambda data: with_header(data, lambda header: header["images"].update(data_offsets=[0])),
    "overlapping_arrays": lambda data: with_header(
        data, lambda header: header["images"].update(data_offsets=header["labels"]["data_offsets"])
    ),
    "terms_of_a_number": lambda data: with_header(data, lambda header: header["__metadata__"].update(terms=1)),
    "other_terms": lambda data: with_header(data, lambda header: header["__metadata__"].update(terms="{}")),
    "another_key": lambda data: with_header(data, lambda header: header["__metadata__"].update(key="f" * 64)),
    "of_another_index_and_key": lambda data: shard_of(make(1, "f" * 64)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_batch_cache_remakes_a_damaged_file(root, damage):
    cache.fetch(range(3), KEY, make, root)
    root.write(cache.name_of(1), DAMAGE[damage](root.read(cache.name_of(1))))
    counted = Counted()
    batches = cache.fetch(range(3), KEY, counted, root)
    assert counted.indices == [1]
    for index, batch in enumerate(batches):
        assert_equal(batch, make(index))
    assert cache.read(root, 1, KEY) is not None


def test_no_damaged_byte_of_the_header_is_served_or_stops_a_run():
    batch = make(0)
    data = shard_of(batch)
    header_size = 8 + int.from_bytes(data[:8], "little")
    damaged = [data[:p] + bytes([data[p] ^ bit]) + data[p + 1 :] for p in range(header_size) for bit in (0x15, 1, 0x80)]
    for broken in damaged:
        found = cache.unpack(broken, 0)
        if found is not None and found.key == KEY:  # a byte between the fields may be another: nothing else
            assert_equal(found, batch)
            assert found.terms == batch.terms


def test_no_damaged_byte_of_the_arrays_and_no_part_of_a_file_is_served():
    data = shard_of(make(0))
    header_size = 8 + int.from_bytes(data[:8], "little")
    for position in range(header_size, len(data)):
        assert cache.unpack(data[:position] + bytes([data[position] ^ 0x15]) + data[position + 1 :], 0) is None
    for size in range(len(data)):
        assert cache.unpack(data[:size], 0) is None


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_the_digest_is_that_of_the_bytes_of_copies(shape, dtype):
    images = np.arange(math.prod(shape)).reshape(shape).astype(dtype)[:, ::-1]
    labels = np.arange(2 * shape[0])[::2]
    slow = hashlib.sha256(f"3 {images.dtype}{images.shape}{labels.dtype}{labels.shape}{{}}".encode())
    slow.update(images.tobytes() + labels.tobytes())
    assert cache.digest(3, images, labels, "{}") == slow.hexdigest()


def test_a_digest_of_a_known_batch_stays_what_it_was():
    # Another value here makes every existing cache worthless.
    images, labels = np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4), np.array([7])
    assert cache.digest(0, images, labels, "{}") == "438fa01d00e709c22f04f695972dce51963e9183208bbc7bfca295e4580416ec"


def test_reading_a_batch_copies_neither_images_nor_labels():
    images = np.zeros((8, 3, 256, 256), np.float32)
    data = shard_of(Batch(0, images, np.arange(8), KEY))
    tracemalloc.start()
    batch = cache.unpack(data, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch is not None and peak < images.nbytes / 10
    whole = np.frombuffer(data, np.uint8)
    assert np.shares_memory(batch.images, whole) and np.shares_memory(batch.labels, whole)


def test_the_indices_there_are_those_of_shards(root):
    assert cache.indices(root) == set()
    for index in (0, 12, 1234567):
        cache.write(root, make(index))
    for name in ("manifest.json", "batch-00001.safetensors", "batch-000003.safetensors.bak"):
        root.write(name, b"")
    assert cache.indices(root) == {0, 12, 1234567}


def test_a_batch_that_two_make_at_once_without_a_lock_is_whole():
    folder = storage.folder(f"fsspec+memory://{uuid.uuid4().hex}")

    def make_while_another_does(index):
        cache.obtain(index, KEY, make, folder)
        return make(index)

    batch, cached = cache.obtain(0, KEY, make_while_another_does, folder)
    assert not cached
    assert_equal(batch, make(0))
    assert_equal(cache.read(folder, 0, KEY), make(0))
    assert folder.names() == [cache.name_of(0)]


def test_a_file_of_another_key_is_not_served(root):
    cache.write(root, make(0))
    assert cache.read(root, 0, "f" * 64) is None


def test_a_missing_batch_is_none(root):
    assert cache.read(root / "nowhere", 0, KEY) is None


def test_keys_and_numerics_classes_have_folders_of_their_own(root):
    folders = {cache.folder_of(root, key, kind) for key in (KEY, "f" * 64) for kind in ("cpu A", "cpu B", "gpu")}
    assert len({str(folder) for folder in folders}) == 6
    assert cache.folder_of(root, KEY, "cpu A") in folders


def test_a_link_in_the_place_of_a_keys_folder_is_refused_and_nothing_is_written_through_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache.folder_of(tmp_path / "c", KEY, "cpu A").path.parent.mkdir()
    cache.folder_of(tmp_path / "c", KEY, "cpu A").path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a symbolic link where a folder was expected; remove it"):
        cache.folder_of(tmp_path / "c", KEY, "cpu A")
    assert cache.folder_of(tmp_path / "c", KEY, "cpu B").name


def test_the_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DFKD_RAY_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.default_folder() == Path("/a")
    monkeypatch.setenv("DFKD_RAY_CACHE", "")
    assert cache.default_folder() == Path("/b/dfkd_ray")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "dfkd_ray"
    monkeypatch.setenv("DFKD_RAY_CACHE", "s3://bucket/a")
    with pytest.raises(ValueError, match=r"s3://bucket/a: expected a local folder; .*`cache`"):
        cache.default_folder()


def test_a_full_disk_leaves_no_part_of_a_batch(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            cache.fetch([0], KEY, make, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == []
    assert_equal(cache.fetch([0], KEY, make, tmp_path)[0], make(0))


def test_an_error_while_making_leaves_the_batch_to_the_next(root):
    def fails(index):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fetch([0], KEY, fails, root)
    assert_equal(cache.fetch([0], KEY, make, root)[0], make(0))


# Another process on the same folder. It waits for a line before it starts; "slow" stops for ever in its first batch.
CHILD = """
import os, sys, time
from pathlib import Path
import numpy as np
from dfkd_ray import cache, storage
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
        assert process.stdout is not None and process.stdin is not None
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
    output, _ = process.communicate(timeout=900)
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


MANIFEST = {"teacher_hash": "c" * 64, "teacher": "tiny", "domain": "train", "config": {"method": "noise", "seed": 0}}


def fill(root, key=KEY, numerics="cpu A", num=3, manifest=True):
    """A folder of a cache with some batches."""
    folder = cache.folder_of(root, key, numerics)
    for index in range(num):
        cache.write(folder, make(index, key))
    if manifest:
        cache.write_manifest(folder, key=key, numerics=numerics, **MANIFEST)
    return folder


def test_a_manifest_says_what_a_folder_holds(root):
    assert cache.read_manifest(root) is None
    cache.write_manifest(root, key=KEY, numerics="cpu A", **MANIFEST)
    expected = {"schema": "dfkd_ray.cache/1", "key": KEY, "numerics": "cpu A", **MANIFEST}
    assert cache.read_manifest(root) == {**expected, "package_version": dfkd_ray.__version__}


def test_a_whole_manifest_is_kept_and_a_damaged_one_written_again(root):
    cache.write_manifest(root, key=KEY, numerics="cpu A", **MANIFEST)
    data = root.read("manifest.json")
    cache.write_manifest(root, key=KEY, numerics="cpu A", **{**MANIFEST, "teacher": "another name"})
    assert root.read("manifest.json") == data
    for damage in (b"", data[:-1], b"[]", b"\xff", b"[" * 100000, data.replace(b"cache/1", b"cache/0"), b"{}"):
        root.write("manifest.json", damage)
        assert cache.read_manifest(root) is None
        cache.write_manifest(root, key=KEY, numerics="cpu A", **MANIFEST)
        assert root.read("manifest.json") == data


def test_a_key_used_again_is_the_last_used(tmp_path):
    old, new = fill(tmp_path), fill(tmp_path, "f" * 64)
    for folder, age_s in ((old, 9e5), (new, 1e5)):
        for path in folder.path.iterdir():
            put_back(path, age_s)
    cache.write_manifest(old, key=KEY, numerics="cpu A", **MANIFEST)
    used = {entry.key: entry.last_used or math.nan for entry in cache_entries.entries(tmp_path)}
    assert time.time() - used[KEY[:32]] < 900 and time.time() - used["f" * 32] > 9e4


def put_foreign_things(root):
    """Files and folders that are not of the cache; how to see that they are still there."""
    (root / "photographs").write("batch-000000.safetensors", b"mine")
    (root / "0123-45").write("a", b"mine")
    (root / f"{'A' * 32}-{'0' * 8}").write("a", b"mine")
    root.write("notes.txt", b"mine")
    return lambda: (len(root.folders()), root.names(), (root / "photographs").names())


def test_entries_count_what_lies_there_and_leave_out_what_is_foreign(root):
    assert cache_entries.entries(root) == []
    put_foreign_things(root)
    folders = [fill(root), fill(root, numerics="cpu B", num=1, manifest=False)]
    found = {entry.folder.name: entry for entry in cache_entries.entries(root)}
    assert set(found) == {folder.name for folder in folders}
    first, second = (found[folder.name] for folder in folders)
    assert (first.key, first.num_batches, second.num_batches) == (KEY[:32], 3, 1)
    assert first.manifest is not None and first.manifest["teacher"] == "tiny" and second.manifest is None
    assert first.size_bytes == sum(len(content(first.folder, name)) for name in first.folder.names())


def test_verify_finds_exactly_the_damaged_shard(root):
    fill(root, "f" * 64)
    folder = fill(root)
    assert list(cache_entries.verify(root)) == []
    data = content(folder, cache.name_of(1))
    folder.write(cache.name_of(1), data[:-1] + bytes([data[-1] ^ 1]))
    (finding,) = cache_entries.verify(root)
    assert (str(finding.entry.folder), finding.name, finding.problem) == (str(folder), cache.name_of(1), "damaged")
    assert finding.damaged and not finding.removed and folder.read(cache.name_of(1)) is not None


def test_verify_removes_what_is_damaged_so_that_it_is_made_again(root):
    folder = fill(root)
    folder.write(cache.name_of(1), b"")
    folder.write(cache.name_of(2), shard_of(make(2, "f" * 64)))
    findings = list(cache_entries.verify(root, remove=True))
    assert [(finding.name, finding.problem, finding.removed) for finding in findings] == [
        (cache.name_of(1), "damaged", True),
        (cache.name_of(2), "of another key", True),
    ]
    assert cache.indices(folder) == {0} and list(cache_entries.verify(root)) == []
    counted = Counted()
    cache.fetch(range(3), KEY, counted, folder)
    assert counted.indices == [1, 2] and list(cache_entries.verify(root)) == []


def test_verify_tells_of_a_missing_manifest_without_calling_it_damage(root):
    folder = fill(root, manifest=False)
    (finding,) = cache_entries.verify(root, remove=True)
    assert finding.name == "manifest.json" and not finding.damaged and not finding.removed
    assert cache.indices(folder) == {0, 1, 2}


@pytest.mark.parametrize("manifest", ["broken", "of_another_numerics_class"])
def test_verify_finds_a_wrong_manifest_and_keeps_its_batches(root, manifest):
    folder = fill(root, manifest=False)
    if manifest == "broken":
        folder.write("manifest.json", b"{")
    else:
        cache.write_manifest(folder, key=KEY, numerics="cpu B", **MANIFEST)
    (finding,) = cache_entries.verify(root, remove=True)
    assert finding.name == "manifest.json" and finding.damaged and finding.removed
    assert cache.indices(folder) == {0, 1, 2}


def test_verify_tells_of_leftovers_of_a_killed_write_but_not_of_a_write_under_way(tmp_path):
    folder = fill(tmp_path)
    left, current = ".batch-000007.safetensors.1-ab.part", ".batch-000008.safetensors.2-cd.part"
    for name in (left, current, ".000007.lock"):
        folder.write(name, b"1")
    put_back(folder.path / left, 3600)
    (finding,) = cache_entries.verify(tmp_path, remove=True)
    assert finding.name == left and not finding.damaged and finding.removed
    assert left not in folder.sizes() and {current, ".000007.lock"} <= set(folder.sizes())


def test_prune_by_key_takes_every_key_that_begins_so(root):
    still_there = put_foreign_things(root)
    before = still_there()
    kept = fill(root, "f" * 64)
    gone = [fill(root), fill(root, numerics="cpu B")]
    removed = cache_entries.prune(root, keys=[KEY[:6]])
    assert {entry.folder.name for entry in removed} == {folder.name for folder in gone}
    assert [entry.folder.name for entry in cache_entries.entries(root)] == [kept.name]
    assert cache_entries.prune(root, keys=["f" * 64])[0].num_batches == 3
    assert cache_entries.entries(root) == [] and still_there() == before


def aged(root, **days):
    """Folders of keys, each last used so many days ago; the newest file of a folder counts."""
    for digit, age in days.items():
        folder = fill(root, digit * 64)
        for path in folder.path.iterdir():
            os.utime(path, (time.time() - (age + 100) * 86400,) * 2)
        os.utime(folder.path / cache.name_of(1), (time.time() - age * 86400,) * 2)


def keys_of(entries):
    return "".join(entry.key[0] for entry in entries)


def test_prune_by_age_takes_what_was_not_used_for_longer(tmp_path):
    aged(tmp_path, a=1, b=40, c=29, d=31)
    assert keys_of(cache_entries.prune(tmp_path, older_than_days=30)) == "bd"
    assert keys_of(cache_entries.entries(tmp_path)) == "ac"
    assert cache_entries.prune(tmp_path, older_than_days=30) == []


def test_prune_by_size_takes_the_longest_unused_and_no_more_than_needed(tmp_path):
    aged(tmp_path, a=1, b=40, c=29, d=31)
    size = cache_entries.entries(tmp_path)[0].size_bytes
    assert cache_entries.prune(tmp_path, max_bytes=4 * size) == []
    assert keys_of(cache_entries.prune(tmp_path, max_bytes=4 * size - 1)) == "b"
    assert keys_of(cache_entries.prune(tmp_path, max_bytes=size)) == "dc"
    assert keys_of(cache_entries.prune(tmp_path, max_bytes=0)) == "a" and cache_entries.entries(tmp_path) == []


def test_prune_by_size_works_where_no_times_are_kept(root):
    sizes = [cache_entries.entry_of(fill(root, digit * 64)).size_bytes for digit in "abc"]
    assert len(cache_entries.prune(root, max_bytes=sum(sizes) - 1)) == 1
    assert len(cache_entries.entries(root)) == 2


def test_a_key_limits_what_age_and_size_may_take(tmp_path):
    aged(tmp_path, a=50, b=40, c=1)
    assert keys_of(cache_entries.prune(tmp_path, keys=["b", "c"], older_than_days=30)) == "b"
    assert keys_of(cache_entries.prune(tmp_path, keys=["c"], max_bytes=0)) == "c"
    assert keys_of(cache_entries.entries(tmp_path)) == "a"


def test_age_and_size_together_take_the_old_and_then_as_much_as_needed(tmp_path):
    aged(tmp_path, a=50, b=20, c=10, d=1)
    size = cache_entries.entries(tmp_path)[0].size_bytes
    assert keys_of(cache_entries.prune(tmp_path, older_than_days=30, max_bytes=2 * size)) == "ab"


def test_a_dry_run_says_the_same_and_removes_nothing(root):
    fill(root)
    would = cache_entries.prune(root, keys=["0"], dry_run=True)
    assert cache_entries.entries(root) == would
    assert cache_entries.prune(root, keys=["0"]) == would and cache_entries.entries(root) == []


@pytest.mark.parametrize("keys", [["e"], ["0", "e"], [""], ["../a"], ["0*"], ["0" * 65]])
def test_prune_refuses_a_key_that_is_none_and_removes_nothing(root, keys):
    fill(root)
    with pytest.raises(ValueError, match="key"):
        cache_entries.prune(root, keys=keys)
    assert len(cache_entries.entries(root)) == 1


def test_prune_refuses_to_remove_without_a_criterion_and_by_an_age_nobody_knows():
    root = storage.folder(f"fsspec+memory://{uuid.uuid4().hex}")
    fill(root)
    with pytest.raises(ValueError, match="nothing says what to remove"):
        cache_entries.prune(root)
    with pytest.raises(ValueError, match="keeps no times"):
        cache_entries.prune(root, older_than_days=1)
    assert len(cache_entries.entries(root)) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_a_shard_is_a_file_that_the_safetensors_library_reads(tmp_path, dtype):
    import safetensors.numpy

    images = np.random.default_rng(0).normal(100, 50, (3, 1, 5, 5)).astype(dtype)
    cache.write(tmp_path, Batch(2, images, np.array([1, -1, 7]), KEY, {}))
    arrays = safetensors.numpy.load_file(tmp_path / cache.name_of(2))
    np.testing.assert_array_equal(arrays["images"], images)
    np.testing.assert_array_equal(arrays["labels"], [1, -1, 7])


# ---- what lies in the wrong place ----------------------------------------------------------------------------------


def test_two_shards_of_one_key_that_were_swapped_are_noticed_and_made_again(root):
    folder = fill(root)
    first, second = cache.name_of(0), cache.name_of(1)
    data = {first: content(folder, second), second: content(folder, first)}
    for name, other in data.items():
        folder.write(name, other)
    assert [(finding.name, finding.problem) for finding in cache_entries.verify(root)] == [
        (first, "damaged"),
        (second, "damaged"),
    ]
    counted = Counted()
    batches = cache.fetch(range(3), KEY, counted, folder)
    assert counted.indices == [0, 1] and list(cache_entries.verify(root)) == []
    for index, batch in enumerate(batches):
        assert_equal(batch, make(index))


def test_a_shard_from_before_the_index_was_in_its_checksum_counts_as_damaged(root):
    folder, batch = fill(root), make(1)
    old = hashlib.sha256(
        f"{batch.images.dtype}{batch.images.shape}{batch.labels.dtype}{batch.labels.shape}{{}}".encode()
    )
    old.update(batch.images.tobytes() + batch.labels.tobytes())
    meta = {"key": KEY, "terms": "{}", "sha256": old.hexdigest()}
    folder.write(cache.name_of(1), *cache.pack(meta, {"labels": batch.labels, "images": batch.images}))
    assert [finding.name for finding in cache_entries.verify(root)] == [cache.name_of(1)]
    assert cache.read(folder, 1, KEY) is None


def put_odd_things(root: Path) -> None:
    """Links that lead nowhere, to themselves or up; folders, pipes and text where files of a cache would be."""
    (root / "loop").symlink_to("loop")
    (root / f"{'a' * 32}-{'b' * 8}").symlink_to(f"{'a' * 32}-{'b' * 8}")
    (root / f"{'c' * 32}-{'d' * 8}").symlink_to(root)
    odd = root / f"{'e' * 32}-{'f' * 8}"
    odd.mkdir()
    (odd / cache.name_of(0)).symlink_to(cache.name_of(0))
    (odd / cache.name_of(1)).symlink_to("nowhere")
    (odd / cache.name_of(2)).mkdir()
    os.mkfifo(odd / cache.name_of(3))
    (odd / cache.name_of(4)).write_text("mine")
    (odd / "inner").symlink_to(odd)
    (odd / "manifest.json").mkdir()
    (root / f"{'0' * 32}-{'1' * 8}").write_text("a file")


def test_link_loops_and_foreign_things_in_a_cache_stop_no_look_at_it(tmp_path):
    folder = fill(tmp_path)
    put_odd_things(tmp_path)
    found = {entry.folder.name: entry for entry in cache_entries.entries(tmp_path)}
    odd = f"{'e' * 32}-{'f' * 8}"
    assert set(found) == {folder.name, odd} and found[odd].num_batches == 1 and found[folder.name].num_batches == 3
    damaged = [finding for finding in cache_entries.verify(tmp_path) if finding.damaged]
    assert [(finding.entry.folder.name, finding.name) for finding in damaged] == [(odd, cache.name_of(4))]
    os.utime(folder.path / "manifest.json", (10**11, 10**11))
    removed = cache_entries.prune(tmp_path, keys=["e"])
    assert [entry.folder.name for entry in removed] == [odd] and (tmp_path / odd / "inner").is_symlink()


def test_a_folder_of_a_cache_that_cannot_be_looked_into_is_one_line_and_the_others_are_listed(
    tmp_path, monkeypatch, run_cli
):
    denied, other = fill(tmp_path), fill(tmp_path, "f" * 64, num=1)
    real = storage.Folder.sizes

    def sizes(folder):
        if folder.name == denied.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(storage.Folder, "sizes", sizes)
    problems = {entry.folder.name: entry.problem for entry in cache_entries.entries(tmp_path)}
    assert problems == {denied.name: "Permission denied", other.name: None}
    listed = run_cli("cache", "ls", "--cache", str(tmp_path))
    assert listed.code == 0 and f"{denied}: cannot be looked into: Permission denied" in listed.out.splitlines()
    assert "f" * 12 in listed.out
    (finding,) = cache_entries.verify(tmp_path)
    assert finding.damaged and finding.problem == "cannot be looked into: Permission denied"
    assert run_cli("cache", "verify", "--cache", str(tmp_path)).code == 1
    pruned = run_cli("cache", "prune", "--cache", str(tmp_path), "--older-than", "0")
    assert pruned.code == 0 and cache.indices(other) == set() and denied.path.exists()


def test_what_cannot_be_removed_is_said_and_the_rest_goes(tmp_path, monkeypatch):
    stuck, other = fill(tmp_path), fill(tmp_path, "f" * 64, num=1)
    real = storage.Folder.clear

    def clear(folder, is_own):
        if folder.name == stuck.name:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(folder, is_own)

    monkeypatch.setattr(storage.Folder, "clear", clear)
    removed = {entry.folder.name: entry.problem for entry in cache_entries.prune(tmp_path, max_bytes=0)}
    assert removed == {stuck.name: "Read-only file system", other.name: None} and not other.path.exists()


def test_an_error_of_the_disk_below_a_cache_names_the_cache(tmp_path, monkeypatch):
    folder = storage.folder(tmp_path / "cache")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"the cache {tmp_path / 'cache'}: No space left on device") as caught:
        cache.fetch([0], KEY, make, folder)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    if os.geteuid() == 0 and sys.platform == "linux":
        mounted = tmp_path / "small"
        mounted.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mounted)], capture_output=True
        ).returncode:
            return  # not allowed in this container: what was seen above has to do
        try:
            with pytest.raises(OSError, match=f"the cache {mounted}: No space left on device"):
                cache.fetch(range(999), KEY, make, mounted)
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
