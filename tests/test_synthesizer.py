"""The synthesizer as a plain class: its batches are those of local synthesis, and cached before anyone has them."""

import ast
import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_ray import bundles, cache, cache_entries, devices, storage, synthesis
from dfkd_ray.config import DeepInversionConfig, synthesis_key
from dfkd_ray.fleet import schedule, synthesizer
from dfkd_ray.fleet.synthesizer import HELD_SOURCES, NotOpened, Spec, Synthesizer
from folders import content, put_back
from helpers import TINY_TRIAL

CPU = torch.device("cpu")
NUMERICS = devices.numerics_class(CPU)
TINY = DeepInversionConfig.model_validate(TINY_TRIAL["synthesis"])


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


def spec_of(teacher: bundles.Teacher, seed: int = 0, domain: str = "train", payload=None) -> Spec:
    config = TINY.model_copy(update={"seed": seed})
    key = synthesis_key(teacher.hash, config, domain)
    payload = bundles.to_arrays(teacher) if payload is None else payload
    return Spec(key, config.model_dump(mode="json"), domain, teacher.hash, teacher.name, payload)


def started(root, *specs: Spec, **options) -> Synthesizer:
    one = Synthesizer(str(root) if root else None, "cpu", **options)
    for spec in specs:
        one.open(spec)
    return one


def local(teacher: bundles.Teacher, index: int, seed: int = 0, domain: str = "train"):
    return synthesis.source(teacher, TINY.model_copy(update={"seed": seed}), CPU, domain)[1](index)


def assert_same(batch, other):
    assert (batch.key, batch.index) == (other.key, other.index)
    np.testing.assert_array_equal(batch.images, other.images)
    np.testing.assert_array_equal(batch.labels, other.labels)


def folder_of(root, spec: Spec) -> storage.Folder:
    return cache.folder_of(str(root), spec.key, NUMERICS)


@pytest.mark.parametrize("domain", ["train", "reference"])
def test_a_batch_equals_the_one_of_local_synthesis(teacher, tmp_path, domain):
    spec = spec_of(teacher, domain=domain)
    one = started(tmp_path, spec)
    for index in (3, 0):
        assert_same(one.batch(spec.key, index)[0], local(teacher, index, domain=domain))


def test_without_a_cache_the_same_batch_is_made_every_time_and_nothing_is_written(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(teacher)
    one = started(None, spec)
    for _ in range(2):
        batch, told = one.batch(spec.key, 1)
        assert not told["found"]
        assert_same(batch, local(teacher, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_and_its_manifest_are_in_the_cache_before_it_is_returned(teacher, tmp_path):
    spec = spec_of(teacher)
    batch, told = started(tmp_path, spec).batch(spec.key, 2)
    assert not told["found"]
    folder = folder_of(tmp_path, spec)
    stored, manifest = cache.read(folder, 2, spec.key), cache.read_manifest(folder)
    assert stored is not None and manifest is not None
    assert_same(stored, batch)
    assert stored.terms == batch.terms
    assert manifest["config"] == TINY.model_dump(mode="json")
    assert {name: manifest[name] for name in ("key", "numerics", "teacher_hash", "teacher", "domain")} == {
        "key": spec.key,
        "numerics": NUMERICS,
        "teacher_hash": teacher.hash,
        "teacher": teacher.name,
        "domain": "train",
    }
    assert list(cache_entries.verify(tmp_path)) == []


def test_a_manifest_is_there_before_the_first_batch_of_its_folder(teacher, tmp_path, monkeypatch):
    spec = spec_of(teacher)
    order = []
    write = storage.Folder.write
    monkeypatch.setattr(storage.Folder, "write", lambda *args: (order.append(args[1]), write(*args))[1])
    started(tmp_path, spec).batch(spec.key, 0)
    assert order == [cache.MANIFEST, cache.name_of(0)]


def test_a_batch_that_cannot_be_stored_is_not_returned(teacher, tmp_path):
    (tmp_path / "file").write_text("in the way")
    spec = spec_of(teacher)
    with pytest.raises(OSError):
        started(tmp_path / "file", spec).batch(spec.key, 0)


def test_a_batch_is_found_the_second_time_and_by_another_synthesizer_without_its_teacher(teacher, tmp_path):
    spec = spec_of(teacher)
    one = started(tmp_path, spec)
    made, told = one.batch(spec.key, 0)
    assert not told["found"]
    other = started(tmp_path, dataclasses.replace(spec, teacher="nobody asks for it"))
    for found_by in (one, other):
        batch, told = found_by.batch(spec.key, 0)
        assert told["found"]
        assert_same(batch, made)
    assert not other.sources


def test_what_is_told_of_a_batch_is_its_size_and_whether_it_was_found(teacher, tmp_path):
    spec = spec_of(teacher)
    one = started(tmp_path, spec)
    for found in (False, True):
        batch, told = one.batch(spec.key, 0)
        size = batch.images.nbytes + batch.labels.nbytes
        assert told.pop("wall_s") >= 0
        assert told == {"found": found, "size_bytes": size, "num_images": 8}


def test_a_key_that_was_not_opened_is_refused_even_where_it_is_cached(teacher, tmp_path):
    spec = spec_of(teacher)
    with pytest.raises(NotOpened):
        started(tmp_path).batch(spec.key, 0)
    started(tmp_path, spec).batch(spec.key, 0)
    with pytest.raises(NotOpened):
        started(tmp_path, spec_of(teacher, seed=1)).batch(spec.key, 0)


def test_a_key_opened_with_something_else_is_refused(teacher):
    wrong = dataclasses.replace(spec_of(teacher), config=TINY.model_copy(update={"seed": 1}).model_dump(mode="json"))
    with pytest.raises(AssertionError, match="was opened with what gives"):
        started(None, wrong).batch(wrong.key, 0)


def test_opening_loads_nothing(teacher):
    one = started(None, *(spec_of(teacher, seed, payload="not loaded") for seed in range(3)))
    assert not one.sources and len(one.specs) == 3


def test_only_the_last_sources_stay_loaded_and_an_unloaded_one_gives_the_same_batches(teacher):
    specs = [spec_of(teacher, seed) for seed in range(HELD_SOURCES + 2)]
    fetched = []
    one = started(None, *specs, fetch=lambda payload: (fetched.append(1), payload)[1])
    for spec in specs:
        one.batch(spec.key, 0)
        assert len(one.sources) <= HELD_SOURCES
    assert list(one.sources) == [spec.key for spec in specs[-HELD_SOURCES:]]
    assert_same(one.batch(specs[0].key, 0)[0], local(teacher, 0))
    assert len(fetched) == len(specs) + 1 and len(one.sources) == HELD_SOURCES


def test_the_source_that_goes_is_the_one_used_longest_ago(teacher):
    specs = [spec_of(teacher, seed) for seed in range(HELD_SOURCES + 1)]
    one = started(None, *specs)
    for spec in [*specs[:HELD_SOURCES], specs[0], specs[HELD_SOURCES]]:
        one.batch(spec.key, 0)
    assert set(one.sources) == {spec.key for spec in specs} - {specs[1].key}


def test_the_teachers_arrays_may_be_read_only_and_stay_as_they_are(teacher):
    payload = bundles.to_arrays(teacher)
    payload["state"] = {name: np.array(array) for name, array in payload["state"].items()}
    before = {name: array.tobytes() for name, array in payload["state"].items()}
    writable = started(None, spec_of(teacher, payload=payload))
    batch, _ = writable.batch(spec_of(teacher).key, 0)
    assert {name: array.tobytes() for name, array in payload["state"].items()} == before
    for array in payload["state"].values():
        array.flags.writeable = False
    again, _ = started(None, spec_of(teacher, payload=payload)).batch(spec_of(teacher).key, 0)
    assert_same(again, batch)
    assert_same(again, local(teacher, 0))


def damage(folder: storage.Folder, how: str) -> None:
    data = content(folder, cache.name_of(0))
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    folder.write(cache.name_of(0), {"cut": data[:-10], "empty": b"", "flipped": flipped}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_shard_is_made_again_and_whole_afterwards(teacher, tmp_path, how):
    spec = spec_of(teacher)
    one = started(tmp_path, spec)
    made, _ = one.batch(spec.key, 0)
    folder = folder_of(tmp_path, spec)
    damage(folder, how)
    assert synthesizer.read_shard(str(tmp_path), spec.key, NUMERICS, 0) == (None, None)
    again, told = one.batch(spec.key, 0)
    assert not told["found"]
    assert_same(again, made)
    assert_same(cache.read(folder, 0, spec.key), made)


def test_a_shard_is_read_as_it_was_made_and_is_none_where_it_is_missing(teacher, tmp_path):
    spec = spec_of(teacher)
    assert synthesizer.read_shard(str(tmp_path), spec.key, NUMERICS, 0) == (None, None)
    made, _ = started(tmp_path, spec).batch(spec.key, 0)
    batch, told = synthesizer.read_shard(str(tmp_path), spec.key, NUMERICS, 0)
    assert_same(batch, made)
    assert told is not None and told["found"] and told["num_images"] == 8


def test_a_synthesizer_says_how_it_computes(teacher):
    hello = started(None).hello()
    assert hello["numerics"] == NUMERICS and hello["pid"] == os.getpid()


def make_old(folder: storage.Folder) -> None:
    """Everything in it was last used a hundred days ago."""
    for path in folder.path.iterdir():
        put_back(path, 100 * cache_entries.DAY_S)


def test_reading_a_batch_is_a_use_of_its_key(teacher, tmp_path):
    spec = spec_of(teacher)
    started(tmp_path, spec).batch(spec.key, 0)
    make_old(folder_of(tmp_path, spec))
    assert len(cache_entries.prune(str(tmp_path), older_than_days=30, dry_run=True)) == 1
    assert started(tmp_path, spec).batch(spec.key, 0)[1]["found"]
    assert cache_entries.prune(str(tmp_path), older_than_days=30, dry_run=True) == []


def test_noting_a_key_again_is_a_use_and_keeps_what_was_written(teacher, tmp_path):
    spec = spec_of(teacher)
    folder = folder_of(tmp_path, spec)
    synthesizer.note(folder, spec, NUMERICS)
    written = folder.read(cache.MANIFEST)
    make_old(folder)
    synthesizer.note(folder, dataclasses.replace(spec, teacher_name="another name"), NUMERICS)
    assert folder.read(cache.MANIFEST) == written
    _, changed = folder.sizes()[cache.MANIFEST]
    assert changed is not None and time.time() - changed < cache_entries.DAY_S


def test_a_manifest_is_noted_once_per_key_and_process_whether_batches_are_made_or_found(teacher, tmp_path, monkeypatch):
    specs, noted = [spec_of(teacher, seed) for seed in range(2)], []
    monkeypatch.setattr(synthesizer, "note", lambda folder, spec, numerics: noted.append(spec.key))
    for _ in range(2):  # the second process finds what the first one made
        one = started(tmp_path, *specs)
        for spec in (*specs, *specs):
            for index in range(2):
                one.batch(spec.key, index)
        assert noted == [spec.key for spec in specs]
        noted.clear()


def test_a_manifest_that_is_missing_is_there_again_when_a_batch_is_found(teacher, tmp_path):
    spec = spec_of(teacher)
    started(tmp_path, spec).batch(spec.key, 0)
    folder = folder_of(tmp_path, spec)
    folder.remove(cache.MANIFEST)
    assert started(tmp_path, spec).batch(spec.key, 0)[1]["found"]
    assert (cache.read_manifest(folder) or {}).get("key") == spec.key


@pytest.mark.parametrize("module", [schedule, synthesizer])
def test_importing_the_module_loads_no_torch_and_no_ray(module):
    allowed = {synthesizer: {"dfkd_ray", "dfkd_ray.batches", "dfkd_ray.storage"}, schedule: set()}[module]
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        names |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert not {name.partition(".")[0] for name in names} & {"torch", "ray", "torchvision"}
    assert {name for name in names if name.startswith("dfkd_ray")} <= allowed
