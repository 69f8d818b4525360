"""Exported images: exactly the stored pixels, exactly as many as asked for, and never mixed with others."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dfkd_ray import data, image_sets
from dfkd_ray.batches import NO_LABEL, Batch
from dfkd_ray.image_sets import Export

KEY = "0123456789abcdef" * 4
BATCH_SIZE = 8


def an_export(folder: Path, format_="folder", num_images=12, shape=(1, 16, 16), **changes) -> Export:
    fields = {
        "key": KEY,
        "config": {"method": "deepinversion", "batch_size": BATCH_SIZE, "seed": 0},
        "teacher": "tiny",
        "teacher_hash": "abc",
        "num_classes": 10,
        "class_names": (),
        "mean": (0.5,) * shape[0],
        "std": (0.25,) * shape[0],
        "pixel_range": (0.0, 1.0),
    }
    return Export(folder=folder, format=format_, num_images=num_images, image_shape=shape, **fields | changes)


def a_batch(index: int, shape=(1, 16, 16), dtype="uint8", num_classes=10, labelled=True) -> Batch:
    rng = np.random.default_rng(index)
    images = rng.integers(0, 256, (BATCH_SIZE, *shape)).astype(np.uint8)
    if dtype != "uint8":
        images = rng.random(images.shape).astype(dtype)
    labels = (np.arange(BATCH_SIZE, dtype=np.int64) + index * BATCH_SIZE) % num_classes
    return Batch(index, images, labels if labelled else np.full(BATCH_SIZE, NO_LABEL), KEY)


def written(todo: Export, **options) -> list[int]:
    """Write what is missing, as the command does; returns which batches that were."""
    missing = image_sets.prepare(todo)
    for index in missing:
        image_sets.write(todo, a_batch(index, todo.image_shape, num_classes=todo.num_classes, **options))
    counts = {"num_made": len(missing), "num_found": 0, "num_kept": todo.num_batches - len(missing)}
    image_sets.finish(todo, seconds=1.0, **counts)
    return missing


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != image_sets.RECORD
    }


def pixels_of(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_holds_exactly_the_stored_pixels_and_as_many_images_as_asked_for(tmp_path, channels):
    shape = (channels, 16, 12)
    written(an_export(tmp_path, num_images=12, shape=shape))
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 12
    for path in files:
        index, row = (int(part) for part in path.stem.split("-"))
        batch = a_batch(index, shape)
        assert np.array_equal(pixels_of(path), batch.images[row]) and path.parent.name == str(batch.labels[row])


@pytest.mark.parametrize(
    "num_classes, names",
    [
        (12, ()),
        (3, ("ant", "bee", "cat")),
        (4, ("T-shirt/top", "Trouser", "Bag", "Ankle boot")),
        (3, ("b", "..", "a")),
        (3, ("a", "a:", "a/")),
        (2, ("Dog", "dog")),
    ],
)
def test_image_folder_and_our_folder_data_set_number_the_classes_as_the_teacher_does(tmp_path, num_classes, names):
    written(an_export(tmp_path, num_images=24, num_classes=num_classes, class_names=names))
    found = ImageFolder(str(tmp_path / "train"))
    assert len(found) == 24 and len(found.classes) == num_classes
    for path, label in found.samples:
        index, row = (int(part) for part in Path(path).stem.split("-"))
        assert label == (index * BATCH_SIZE + row) % num_classes
    ours = data.open_dataset(str(tmp_path), tmp_path, train=True, image_shape=(1, 16, 16))
    assert ours.labels.tolist() == found.targets
    assert ours.read([0]).shape == (1, 1, 16, 16)


def test_class_folders_carry_the_classes_names_alone_where_those_sort_in_class_order():
    assert image_sets.class_folders(3, ("ant", "bee", "cat")) == ["ant", "bee", "cat"]
    assert image_sets.class_folders(2, ("T-shirt/top", "Bag")) == ["0-T-shirt_top", "1-Bag"]


def test_images_without_a_label_are_called_no_class(tmp_path):
    written(an_export(tmp_path), labelled=False)
    assert len(list((tmp_path / "unlabelled").glob("*.png"))) == 12 and not (tmp_path / "train").exists()


def test_a_folder_of_float_images_is_rounded_to_8_bits_over_the_pixel_range(tmp_path):
    todo = an_export(tmp_path, pixel_range=(-1.0, 1.0), num_images=1)
    image_sets.prepare(todo)
    batch = a_batch(0)
    image_sets.write(todo, replace(batch, images=(batch.images / np.float32(127.5) - 1).astype(np.float32)))
    assert np.array_equal(pixels_of(tmp_path / "train/0/000000-0000.png"), batch.images[0])


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_parquet_holds_exactly_the_stored_batches(tmp_path, dtype, channels):
    shape = (channels, 5, 7)
    written(an_export(tmp_path, "parquet", shape=shape), dtype=dtype)
    for index, size in ((0, 8), (1, 4)):
        read, made = image_sets.read_part(tmp_path / f"part-{index:06d}.parquet"), a_batch(index, shape, dtype)
        assert read.images.dtype == made.images.dtype and np.array_equal(read.images, made.images[:size])
        assert np.array_equal(read.labels, made.labels[:size]) and (read.index, read.key) == (index, KEY)


def test_a_parquet_file_says_what_its_images_are(tmp_path):
    written(an_export(tmp_path, "parquet"))
    schema = pq.read_schema(tmp_path / "part-000000.parquet")
    said = {name.decode(): text.decode() for name, text in schema.metadata.items()}
    assert said["dfkd_ray.schema"] == "dfkd_ray.images/1" and said["dfkd_ray.teacher_hash"] == "abc"
    assert json.loads(said["dfkd_ray.config"])["batch_size"] == BATCH_SIZE
    assert [json.loads(said[f"dfkd_ray.{name}"]) for name in ("mean", "std", "pixel_range")] == [[0.5], [0.25], [0, 1]]
    table = pq.read_table(tmp_path / "part-000001.parquet")
    assert table.column_names == list(image_sets.COLUMNS)
    assert table["row"].to_pylist() == [0, 1, 2, 3] and set(table["batch_index"].to_pylist()) == {1}
    assert table["image"][0].as_py().startswith(b"\x89PNG") and table["shape"][0].as_py() == [1, 16, 16]


@pytest.mark.parametrize("format_", ["folder", "parquet"])
def test_two_exports_of_the_same_images_are_the_same_bytes(tmp_path, format_):
    for name in ("a", "b", "a"):
        written(an_export(tmp_path / name, format_))
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")


def test_parquet_files_that_are_there_are_not_written_again_unless_cut_or_damaged(tmp_path):
    assert written(an_export(tmp_path, "parquet", num_images=20)) == [0, 1, 2]
    assert written(an_export(tmp_path, "parquet", num_images=20)) == []
    assert written(an_export(tmp_path, "parquet", num_images=26)) == [2, 3]
    part = tmp_path / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    assert written(an_export(tmp_path, "parquet", num_images=26)) == [1]
    assert sum(len(image_sets.read_part(path).labels) for path in tmp_path.glob("*.parquet")) == 26


def test_synthesis_json_comes_last_and_says_what_is_there(tmp_path):
    todo = an_export(tmp_path, "parquet")
    assert image_sets.prepare(todo) == [0, 1]
    image_sets.write(todo, a_batch(0))
    assert not (tmp_path / "synthesis.json").exists()
    assert written(todo) == [1]
    record = json.loads((tmp_path / "synthesis.json").read_text())
    assert (record["key"], record["format"], record["num_images"], record["teacher"]) == (KEY, "parquet", 12, "tiny")
    assert (record["num_made"], record["num_kept"], record["config"]) == (1, 1, todo.config)
    assert not (tmp_path / ".synthesis.json").exists()
    image_sets.prepare(replace(todo, num_images=16))  # what is there is no longer the whole
    assert not (tmp_path / "synthesis.json").exists()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "changes, part",
    [({"key": "f" * 64}, "key"), ({"format": "folder"}, "format"), ({"num_images": 11}, "fewer")],
)
def test_a_folder_of_other_images_is_refused_and_stays_as_it_is(tmp_path, whole, changes, part):
    todo = an_export(tmp_path, "parquet")
    if whole:
        written(todo)
    else:
        image_sets.prepare(todo)
        image_sets.write(todo, a_batch(0))
    before = bytes_below(tmp_path)
    with pytest.raises(ValueError, match=part):
        image_sets.prepare(replace(todo, **changes))
    assert bytes_below(tmp_path) == before


def test_a_run_that_failed_before_its_first_image_has_claimed_no_folder(tmp_path):
    image_sets.prepare(an_export(tmp_path, "parquet", key="f" * 64))
    assert written(an_export(tmp_path)) == [0, 1]


def test_somebody_elses_images_are_refused(tmp_path):
    (tmp_path / "real" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds what is not a set of images of dfkd_ray \(train\)"):
        image_sets.prepare(an_export(tmp_path / "real"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "synthesis.json").write_text("{}")
    with pytest.raises(ValueError, match="holds what is not a set of images"):
        image_sets.prepare(an_export(tmp_path / "other"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, and it is none"):
        image_sets.prepare(an_export(tmp_path / "file"))
    written(an_export(tmp_path / "mixed", "parquet"))
    written(an_export(tmp_path / "others", "parquet", key="f" * 64))
    os.replace(tmp_path / "others" / "part-000001.parquet", tmp_path / "mixed" / "part-000001.parquet")
    with pytest.raises(ValueError, match=r"part-000001\.parquet: not of synthesis 0123456789ab"):
        image_sets.prepare(an_export(tmp_path / "mixed", "parquet"))


def test_channels_that_no_png_has_are_refused_with_a_hint(tmp_path):
    with pytest.raises(ValueError, match="have 4; use `format=parquet`"):
        image_sets.prepare(an_export(tmp_path / "o", shape=(4, 8, 8)))
    with pytest.raises(ValueError, match="expected folder or parquet"):
        image_sets.prepare(an_export(tmp_path / "o", "jpeg"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("format_", ["folder", "parquet"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, format_):
    todo = an_export(tmp_path, format_)
    image_sets.prepare(todo)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        image_sets.write(todo, a_batch(0))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".synthesis.json"]
