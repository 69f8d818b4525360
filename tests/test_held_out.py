"""Images that were held out of a teacher's training stay held out, by whatever path its training set is given."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_ray import bundles, teachers
from dfkd_ray import data as datasets
from dfkd_ray.cli import held_out, inputs
from dfkd_ray.config import RealConfig
from helpers import refusal

NUM_IMAGES, NUM_HELD_OUT = 24, 6


def write_pets(root, seed=0, num_images=NUM_IMAGES):
    rng = np.random.default_rng(seed)
    for index in range(num_images):
        path = root / "train" / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def pets(tmp_path):
    return write_pets(tmp_path / "here" / "pets")


@pytest.fixture
def teacher(pets, tiny_teacher):
    """A teacher whose bundle says that it was trained on the pets, six of which were held out."""
    plain = bundles.load(str(tiny_teacher))
    found = datasets.open_dataset(str(pets), pets, train=True, image_shape=(1, 16, 16))
    rows = teachers.split(len(found), NUM_HELD_OUT, 3)[1].tolist()
    training = {"num_validation": NUM_HELD_OUT, "seed": 3, "dataset": str(pets)}
    notes = {"training": training, **held_out.note_of(found, rows)}
    described = {"num_classes": 2, "class_names": ("cat", "dog"), "dataset": found.name, "notes": notes}
    info = bundles.BundleInfo.model_validate({**plain.info.model_dump(), **described})
    return replace(plain, info=info)


def split(teacher, name):
    """The files to train on, and those held out."""
    found, rows, out = inputs.training_split(teacher, str(name), Path("no data"), False)
    return [sorted(found.files[row] for row in some.tolist()) for some in (rows, out)]

    return Path("no data")


def test_images_stay_held_out_by_whatever_path_the_folder_is_given(teacher, pets, tmp_path, monkeypatch):
    expected = split(teacher, pets)
    assert [len(files) for files in expected] == [NUM_IMAGES - NUM_HELD_OUT, NUM_HELD_OUT]
    (tmp_path / "link").symlink_to(pets)
    shutil.copytree(pets, tmp_path / "copy")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(pets.parent)
    for path in ("pets", "./pets/", "../here/pets", "../link", tmp_path / "copy", "~/here/pets", f"{pets}/train/.."):
        assert split(teacher, path) == expected, path
    os.rename(pets, tmp_path / "renamed")
    assert split(teacher, tmp_path / "renamed") == expected


@pytest.mark.parametrize("change", ["more", "fewer", "class"])
def test_a_training_set_that_was_changed_is_refused(teacher, pets, change):
    if change == "more":
        Image.new("L", (16, 16), 7).save(pets / "train" / "cat" / "new.png")
    elif change == "fewer":
        (pets / "train" / "cat" / "00.png").unlink()
    else:
        os.rename(pets / "train" / "cat" / "00.png", pets / "train" / "dog" / "00.png")
    refusal(lambda: split(teacher, pets), "held 6 images", "as it was", "24 images then")


def test_other_images_are_used_whole_even_from_a_folder_of_that_name(teacher, tmp_path, pets):
    for other in (write_pets(tmp_path / "other", seed=1), write_pets(tmp_path / "there" / "pets", seed=1)):
        assert [len(files) for files in split(teacher, other)] == [NUM_IMAGES, 0]
    out = split(teacher, pets)[1]
    for file in out:
        (pets / "train" / file).unlink()
    assert [len(files) for files in split(teacher, pets)] == [NUM_IMAGES - NUM_HELD_OUT, 0]


def test_a_bundle_without_the_note_is_believed_by_the_folders_name_only(teacher, pets, tmp_path):
    notes = {"training": teacher.info.notes["training"]}
    older = replace(teacher, info=teacher.info.model_copy(update={"notes": notes}))
    assert split(older, pets) == split(teacher, pets)
    shutil.copytree(pets, tmp_path / "copy")
    refusal(lambda: split(older, tmp_path / "copy"), "held 6 images", "pets")


def test_a_teacher_of_a_known_set_says_that_it_cannot_tell(teacher, pets, capsys):
    notes = {"training": teacher.info.notes["training"]}
    other = replace(teacher, info=teacher.info.model_copy(update={"notes": notes, "dataset": "mnist"}))
    assert len(split(other, pets)[0]) == NUM_IMAGES
    assert "note:" in (said := capsys.readouterr().err) and "6 images of mnist" in said


def test_the_held_out_images_are_found_where_the_training_found_them(teacher, pets, tmp_path, monkeypatch):
    batches = inputs.open_test(teacher, "validation", tmp_path)
    assert batches is not None and len(batches[0].labels) == NUM_HELD_OUT
    os.rename(pets, tmp_path / "pets")
    moved = inputs.open_test(teacher, "validation", tmp_path)  # below the data root
    assert moved is not None and np.array_equal(moved[0].images, batches[0].images)
    os.rename(tmp_path / "pets", tmp_path / "gone")
    refusal(lambda: inputs.open_test(teacher, "validation", tmp_path), "not here", "pets")


def test_real_images_have_one_key_by_whatever_path_and_another_for_other_images(teacher, pets, tmp_path):
    (tmp_path / "link").symlink_to(pets)
    settings = RealConfig(batch_size=6)
    source, again, other = (
        inputs.open_real(teacher, str(path), tmp_path, settings, False)
        for path in (pets, tmp_path / "link", write_pets(tmp_path / "other", seed=1))
    )
    assert source(0).key == again(0).key != other(0).key
    assert np.array_equal(source(0).images, again(0).images)
    taken = np.concatenate([source(index).images for index in range(3)])
    out = inputs.open_test(teacher, "validation", tmp_path)
    assert out is not None and not any((taken == image).all(axis=(1, 2, 3)).any() for image in out[0].images)


def test_all_commands_number_class_folders_alike(teacher, tmp_path, capsys):
    names = [str(number) for number in range(11)]
    for part in ("train", "test"):
        for number, name in enumerate(names):
            (tmp_path / "n" / part / name).mkdir(parents=True)
            Image.new("L", (16, 16), number * 20).save(tmp_path / "n" / part / name / "0.png")
    described = {"num_classes": 11, "class_names": (), "dataset": None, "notes": {}}
    unnamed = replace(teacher, info=teacher.info.model_copy(update=described))
    trained = datasets.open_dataset(str(tmp_path / "n"), tmp_path, train=True, image_shape=(1, 16, 16))
    assert trained.class_names == tuple(names)
    train, *_ = inputs.training_split(unnamed, str(tmp_path / "n"), tmp_path, False)
    assert "note:" in (said := capsys.readouterr().err) and "0, 1, 2, …" in said
    test = inputs.open_test(unnamed, str(tmp_path / "n"), tmp_path)
    assert test is not None and test[0].labels.tolist() == train.labels.tolist() == list(range(11))
    brightness = test[0].images[:, 0, 0, 0].tolist()
    assert brightness == sorted(brightness)
    named = replace(unnamed, info=unnamed.info.model_copy(update={"class_names": tuple(sorted(names))}))
    assert torch.equal(inputs.training_split(named, str(tmp_path / "n"), tmp_path, False)[0].labels, train.labels)


def test_folders_that_are_not_the_classes_are_refused_for_training_images_too(teacher, tmp_path, pets):
    os.rename(pets / "train" / "dog", pets / "train" / "wolf")
    for call in (
        lambda: inputs.training_split(teacher, str(pets), tmp_path, False),
        lambda: inputs.open_real(teacher, str(pets), tmp_path, RealConfig(), False),
    ):
        refusal(call, "wolf", "cat, dog")
    unnamed = replace(teacher, info=teacher.info.model_copy(update={"class_names": (), "num_classes": 3}))
    refusal(lambda: inputs.open_real(unnamed, str(pets), tmp_path, RealConfig(), False), "2 classes", "has 3")
