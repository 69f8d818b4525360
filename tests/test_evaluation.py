"""The reference set: mixtures of held-out images, the same for all trials; what is measured on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfkd_ray import bundles, evaluation, trial
from dfkd_ray.config import TrialConfig, validate
from dfkd_ray.images import PixelSpace
from helpers import make_teacher, tiny_trial

SPACES = [PixelSpace((0.5,), (0.25,)), PixelSpace((0.0,), (1.0,), low=-1.0, high=3.0)]


def images_of(num: int, dtype: str = "uint8", space: PixelSpace = SPACES[0], shape=(1, 4, 4), seed: int = 0) -> Any:
    """Random stored images over the whole pixel range."""
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    return rng.uniform(space.low, space.high, (num, *shape)).astype(dtype)


def parents(num: int) -> np.ndarray:
    """The shares (num, num) of the images in each mixture, found by mixing one-hot images."""
    one_hot = np.eye(num, dtype=np.float32).reshape(num, 1, 1, num)
    return evaluation.mixtures(one_hot, SPACES[0]).reshape(num, num)


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 3, 4, 7, 16, 255, 256])
def test_each_image_is_mixed_with_one_other_and_is_the_other_of_one(num):
    shares = parents(num)
    own = np.diagonal(shares)
    others = shares - np.diag(own)
    assert ((others > 0).sum(axis=1) == 1).all() and ((others > 0).sum(axis=0) == 1).all()
    assert ((own > 0) & (own < 1)).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)


def test_the_shares_are_spread_over_the_whole_range():
    own = np.diagonal(parents(1024))
    counts, _ = np.histogram(own, bins=8, range=(0, 1))
    assert counts.min() > 90 and counts.max() < 170, "uniform: 128 each"


@pytest.mark.parametrize("space", SPACES, ids=["0 to 1", "-1 to 3"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("num", [2, 5, 32])
def test_every_pixel_lies_between_those_of_its_two_images_and_in_the_range(num, dtype, space):
    images = images_of(num, dtype, space)
    mixed = evaluation.mixtures(images, space)
    assert mixed.dtype == np.float32 and mixed.shape == images.shape
    pixels = images.astype(np.float64)
    if dtype == "uint8":
        pixels = pixels / 255 * (space.high - space.low) + space.low
    shares = parents(num)
    partner = (shares - np.diag(np.diagonal(shares))).argmax(axis=1)
    low, high = np.minimum(pixels, pixels[partner]), np.maximum(pixels, pixels[partner])
    assert (mixed >= low - 1e-5).all() and (mixed <= high + 1e-5).all()
    assert mixed.min() >= space.low - 1e-5 and mixed.max() <= space.high + 1e-5
    assert (np.abs(mixed - pixels) > 1e-3).any(axis=(1, 2, 3)).all(), "none is left as it was"


def test_pairs_and_shares_depend_on_the_number_of_images_alone():
    space = SPACES[0]
    one, other = images_of(9, "float32"), images_of(9, "float32", seed=1)
    first = evaluation.mixtures(one, space)
    torch.manual_seed(5)
    np.random.seed(5)
    np.testing.assert_array_equal(evaluation.mixtures(one, space), first)
    mixed = np.einsum("ij,jchw->ichw", parents(9), other)
    np.testing.assert_allclose(evaluation.mixtures(other, space), mixed, atol=1e-6)
    wide = images_of(9, "float32", shape=(3, 2, 5))
    np.testing.assert_allclose(
        evaluation.mixtures(wide, space), np.einsum("ij,jchw->ichw", parents(9), wide), atol=1e-6
    )
    assert not np.allclose(parents(10)[:9, :9], parents(9))


def test_the_images_themselves_and_the_global_generator_are_left_alone():
    images = images_of(6)
    before, state = images.copy(), torch.get_rng_state()
    evaluation.mixtures(images, SPACES[0])
    np.testing.assert_array_equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("space", SPACES, ids=["0 to 1", "-1 to 3"])
def test_bytes_and_the_same_pixels_as_floats_give_the_same_mixtures(space):
    stored = images_of(12)
    pixels = stored.astype(np.float32) / 255 * (space.high - space.low) + space.low
    mixed = evaluation.mixtures(stored, space)
    np.testing.assert_allclose(mixed, evaluation.mixtures(pixels.astype(np.float32), space), atol=1e-5)


def test_signals_are_mixed_like_images():
    signals = images_of(6, "float32", shape=(2, 30))
    as_images = evaluation.mixtures(signals[:, :, None], SPACES[0])
    np.testing.assert_array_equal(evaluation.mixtures(signals, SPACES[0])[:, :, None], as_images)


# ---- in a trial ------------------------------------------------------------------------------------------------------


@pytest.fixture
def references(monkeypatch):
    """The images of each reference set that is made."""
    found, real = [], evaluation.reference

    def reference(teacher, images, *more):
        found.append(images)
        return real(teacher, images, *more)

    monkeypatch.setattr(evaluation, "reference", reference)
    return found


@pytest.fixture
def mixed_from(monkeypatch):
    """What is mixed."""
    found, real = [], evaluation.mixtures

    def mixtures(images, *more):
        found.append(images)
        return real(images, *more)

    monkeypatch.setattr(evaluation, "mixtures", mixtures)
    return found


def config_of(teacher: str | Path, **fields: Any) -> TrialConfig:
    """A trial that keeps the criterion's weights: one that chooses them is compared on its own images too."""
    return validate(TrialConfig, tiny_trial(teacher, **{"reconstruction.reselect": False} | fields))


def test_a_trial_is_compared_on_mixtures_or_where_asked_for_on_the_images_and_is_another_trial_then(
    tiny_teacher, references, mixed_from
):
    teacher = bundles.load(str(tiny_teacher))
    mixed, plain = config_of(tiny_teacher), config_of(tiny_teacher, **{"reference.mixed": False})
    assert mixed.reference.mixed
    rows = [trial.run(config, teacher).row for config in (mixed, plain)]
    (images,) = mixed_from
    assert references[1].dtype == np.uint8 and len(images) == mixed.reference.num_images
    np.testing.assert_array_equal(references[1], images)
    np.testing.assert_array_equal(references[0], evaluation.mixtures(images, teacher.info.space))
    assert rows[0]["trial_id"] != rows[1]["trial_id"] and rows[0]["reference_kl"] != rows[1]["reference_kl"]
    assert [row["reference.mixed"] for row in rows] == [True, False]
    assert rows[0]["synthesis_key"] == rows[1]["synthesis_key"], "the images are the same, and made once"


def test_the_reference_has_the_number_of_images_asked_for_whatever_the_batch_size(tiny_teacher, references):
    teacher = bundles.load(str(tiny_teacher))
    for size in (4, 8, 16):
        config = config_of(tiny_teacher, **{"reference.num_images": 6, "reference.synthesis.batch_size": size})
        trial.run(config, teacher)
    assert [len(images) for images in references] == [6, 6, 6]


def test_the_reference_of_a_network_without_batchnorm_is_mixed_alike(tmp_path, references, mixed_from):
    noise = {"method": "noise", "batch_size": 8}
    teacher = make_teacher(tmp_path / "t")
    row = trial.run(config_of(tmp_path / "t", synthesis=noise, **{"reference.synthesis": noise}), teacher).row
    assert row["status"] == "finished" and len(mixed_from) == 1 and references[0].dtype == np.float32
    np.testing.assert_array_equal(references[0], evaluation.mixtures(mixed_from[0], teacher.info.space))
