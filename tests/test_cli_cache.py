import subprocess
import sys
import time
import uuid

import numpy as np
import pytest

from dfkd_ray import cache, cache_entries, storage
from dfkd_ray.batches import Batch
from dfkd_ray.cli import cache as commands
from folders import content, put_back, remove_everything

KEY, OTHER = "0123456789abcdef" * 4, "f" * 64


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    """A cache of two keys, the second without a manifest, and a folder that is not the cache's."""
    where = tmp_path / "cache" if request.param == "disk" else f"fsspec+memory://{uuid.uuid4().hex}/cache"
    folder = storage.folder(where)
    for key, num in ((KEY, 3), (OTHER, 1)):
        for index in range(num):
            images = np.full((4, 1, 6, 6), index, np.uint8)
            cache.write(cache.folder_of(folder, key, "cpu [A], torch 2"), Batch(index, images, np.arange(4), key))
    cache.write_manifest(
        cache.folder_of(folder, KEY, "cpu [A], torch 2"),
        key=KEY,
        numerics="cpu [A], torch 2",
        teacher_hash="c" * 64,
        teacher="tiny_teacher",
        domain="train",
        config={"method": "noise"},
    )
    (folder / "foreign").write("notes.txt", b"mine")
    yield folder
    remove_everything(folder)


def keys_in(root):
    return {entry.key[0] for entry in cache_entries.entries(root)}


def test_ls_shows_every_key_and_the_total(run_cli, root):
    done = run_cli("cache", "ls", "--cache", root.uri)
    assert (done.code, done.err) == (0, "")
    lines = [line.strip() for line in done.out.splitlines()]
    known, unknown = (line for line in lines if line.startswith(("0123456789ab ", "ffffffffffff ")))
    for cell in ("tiny_teacher", "noise/train", " 3 ", " kB ", "cpu [A], torch 2"):
        assert cell in known
    assert " 1 " in unknown and "foreign" not in done.out
    size = sum(entry.size_bytes for entry in cache_entries.entries(root))
    assert done.out.splitlines()[-1] == f"{root}: 2 keys, 4 batches, {commands.size_text(size)}"
    assert (time.strftime("%Y-%m-%d") in known) == root.is_local


def test_commands_look_at_the_default_cache_where_none_is_named(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("DFKD_RAY_CACHE", str(tmp_path / "nowhere"))
    done = run_cli("cache", "ls")
    assert (done.code, done.out) == (0, f"{tmp_path / 'nowhere'}: 0 keys, 0 batches, 0 B\n")
    assert run_cli("cache", "verify").code == 0
    assert not (tmp_path / "nowhere").exists()


def test_verify_of_a_whole_cache_succeeds_and_tells_of_the_missing_manifest(run_cli, root):
    done = run_cli("cache", "verify", "--cache", root.uri)
    assert done.code == 0
    first, last = done.out.splitlines()
    assert OTHER[:32] in first and "manifest.json: missing" in first
    assert last == f"{root}: 4 batches in it, 0 damaged found, 0 left"


def test_verify_fails_until_what_is_damaged_is_removed(run_cli, root):
    folder = cache.folder_of(root, KEY, "cpu [A], torch 2")
    folder.write(cache.name_of(1), content(folder, cache.name_of(1))[:-1])
    for _ in range(2):
        done = run_cli("cache", "verify", "--cache", root.uri)
        assert done.code == 1 and f"{folder / cache.name_of(1)}: damaged\n" in done.out
    done = run_cli("cache", "verify", "--remove", "--cache", root.uri)
    assert done.code == 0 and f"{folder / cache.name_of(1)}: damaged; removed\n" in done.out
    assert run_cli("cache", "verify", "--cache", root.uri).code == 0 and cache.indices(folder) == {0, 2}


def test_prune_by_key_removes_it_after_a_dry_run_that_does_not(run_cli, root):
    done = run_cli("cache", "prune", "--cache", root.uri, "--key", "0123", "--dry-run")
    assert done.code == 0 and "would remove" in done.out and keys_in(root) == {"0", "f"}
    done = run_cli("cache", "prune", "--cache", root.uri, "--key", "0123")
    assert done.code == 0 and f"{root}: removed 1 key, " in done.out and keys_in(root) == {"f"}
    assert (root / "foreign").names() == ["notes.txt"]


def test_prune_by_size_leaves_at_most_that_much(run_cli, root):
    done = run_cli("cache", "prune", "--cache", root.uri, "--max-size", "1GB")
    assert done.code == 0 and "removed 0 keys" in done.out and keys_in(root) == {"0", "f"}
    assert run_cli("cache", "prune", "--cache", root.uri, "--max-size", "0").code == 0
    assert keys_in(root) == set() and (root / "foreign").names() == ["notes.txt"]


def test_prune_by_age_takes_the_old_or_says_that_nothing_has_an_age(run_cli, root):
    if root.is_local:
        for path in cache.folder_of(root, OTHER, "cpu [A], torch 2").path.iterdir():
            put_back(path, 40 * 86400)
    done = run_cli("cache", "prune", "--cache", root.uri, "--older-than", "30")
    if root.is_local:
        assert done.code == 0 and keys_in(root) == {"0"}
    else:
        assert done.code == 2 and "keeps no times" in done.err and keys_in(root) == {"0", "f"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune",), "--key, --older-than or --max-size"),
        (("prune", "--dry-run"), "--key, --older-than or --max-size"),
        (("prune", "--max-size", "big"), "--max-size 'big'"),
        (("prune", "--max-size", "2 parsecs"), "--max-size '2 parsecs'"),
        (("prune", "--max-size", "-1"), "--max-size '-1'"),
        (("prune", "--older-than", "-1"), "--older-than -1"),
        (("prune", "--older-than", "nan"), "--older-than nan"),
        (("prune", "--key", "123"), "key 123"),
        (("prune", "--key", ""), "key ''"),
    ],
)
def test_bad_input_is_one_line_and_removes_nothing(run_cli, root, words, message):
    done = run_cli("cache", *words, "--cache", root.uri)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
    assert keys_in(root) == {"0", "f"}


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("prune", "--max-size", "1")])
@pytest.mark.parametrize("where", ["bad://x", "", "fsspec+nope://a"])
def test_an_unusable_cache_is_one_line(run_cli, command, where):
    done = run_cli("cache", *command, "--cache", where)
    assert done.code == 2 and where in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500000", 500000), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("10kB", 10**4), (" 3 mb ", 3 * 10**6)],
)
def test_a_size_is_read_with_decimal_and_binary_units(text, size):
    assert commands.parse_size(text) == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2 * 10**9, "2.0 GB"), (5 * 10**15, "5000.0 TB")]
)
def test_a_size_is_shown_with_a_decimal_unit(size, text):
    assert commands.size_text(size) == text


def test_the_commands_need_no_torch(tmp_path):
    code = "import sys; from dfkd_ray.cli.cache import list_entries; list_entries(sys.argv[1])"
    code += "; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=900).returncode == 0
