"""Random overlapping shapes: as a synthesis method, and as what the reference images are mixed with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfkd_ray import bundles, evaluation, synthesis, trial
from dfkd_ray.batches import NO_LABEL
from dfkd_ray.config import ShapesConfig, TrialConfig, validate
from dfkd_ray.images import PixelSpace
from dfkd_ray.synthesis import shapes
from dfkd_ray.trial.images import SHAPES_SEED
from helpers import CPU, make_teacher, tiny_trial


def drawn(shape: tuple[int, int, int], num_images: int = 32, seed: int = 0) -> torch.Tensor:
    return shapes.drawn(num_images, shape, torch.Generator().manual_seed(seed))


def mean_step(images: torch.Tensor) -> float:
    """Mean difference of neighbours along the last axis, in standard deviations."""
    return float(images.diff(dim=-1).abs().mean() / images.std())


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 20, 48), (3, 48, 20), (2, 1, 64), (1, 1, 1), (1, 4, 4), (1, 64, 1)])
def test_images_of_any_size_are_finite_and_differ(shape):
    images = drawn(shape)
    assert images.shape == (32, *shape) and images.isfinite().all()
    assert len(torch.unique(images.flatten(1), dim=0)) == 32


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 20, 48), (2, 1, 64)])
def test_neighbours_are_alike_with_edges_between_and_channels_have_the_normalised_scale(shape):
    images = drawn(shape, 256)
    assert mean_step(images) < 0.5 * mean_step(torch.randn(256, *shape))
    steps = images.diff(dim=-1).abs().flatten()
    assert steps.quantile(0.5) < 0.1 * steps.quantile(0.99), "few large steps, most small"
    assert (images.mean(dim=(0, 2, 3)).abs() < 0.3).all() and 0.7 < float(images.std()) < 1.2


def test_batches_are_pure_in_the_index_without_labels_and_in_the_pixel_range(tmp_path):
    teacher = make_teacher(tmp_path / "t")
    key, batch = synthesis.source(teacher, ShapesConfig(batch_size=6), CPU)
    again = synthesis.source(teacher, ShapesConfig(batch_size=6), CPU)[1]
    batch(0)
    np.testing.assert_array_equal(batch(3).images, again(3).images)
    assert (batch(3).images != batch(4).images).any() and batch(3).images.dtype == np.uint8
    assert (batch(3).labels == NO_LABEL).all() and batch(3).key == key
    assert synthesis.source(teacher, ShapesConfig(batch_size=6, seed=1), CPU)[0] != key
    stored = synthesis.source(teacher, ShapesConfig(batch_size=6, storage="float32"), CPU)[1](0).images
    assert stored.min() >= 0 and stored.max() <= 1


def test_stored_shapes_lie_in_the_pixel_range_of_the_teacher():
    space = PixelSpace((-0.5, 2.0), (0.5, 1.5), low=-1.0, high=3.0)
    images = shapes.stored((40, 2, 8, 8), space, 0)
    assert images.dtype == np.float32 and images.min() >= -1 and images.max() <= 3
    np.testing.assert_array_equal(images, shapes.stored((40, 2, 8, 8), space, 0))
    np.testing.assert_allclose(images.mean(axis=(0, 2, 3)), (-0.5, 2.0), atol=0.4)


# ---- the reference set -----------------------------------------------------------------------------------------------


def config_of(teacher: str | Path, **fields: Any) -> TrialConfig:
    return validate(TrialConfig, tiny_trial(teacher, **fields))


def test_a_trial_is_compared_on_mixtures_with_shapes_where_asked_for_and_is_another_trial_then(
    tiny_teacher, monkeypatch
):
    compared, made = [], evaluation.reference
    monkeypatch.setattr(
        evaluation, "reference", lambda net, images, *more: compared.append(images) or made(net, images, *more)
    )
    teacher = bundles.load(str(tiny_teacher))
    space = teacher.info.space
    names = ({"reference.mixed": False}, {}, {"reference.mixed_with": "images"}, {"reference.mixed_with": "shapes"})
    once = {"reconstruction.reselect": False}  # weights that are chosen anew are compared on their own images too
    rows = [trial.run(config_of(tiny_teacher, **once, **fields), teacher).row for fields in names]
    plain, pairs, _, blends = compared
    pixels = plain.astype(np.float32) / 255
    others = shapes.stored(plain.shape, space, SHAPES_SEED)
    np.testing.assert_allclose(blends, evaluation.mixtures(pixels, space, others), atol=1e-6)
    weights = (blends - others) / (pixels - others)
    at_scale = np.abs(pixels - others) > 0.1
    assert all(np.ptp(weights[i][at_scale[i]]) < 1e-4 for i in range(len(plain))), "one weight for each image"
    assert (blends != pairs).any()
    assert rows[1]["trial_id"] == rows[2]["trial_id"] != rows[3]["trial_id"] != rows[0]["trial_id"]
    assert rows[1]["reference_kl"] == rows[2]["reference_kl"] != rows[3]["reference_kl"]
    assert [row["reference.mixed_with"] for row in rows] == ["images", "images", "images", "shapes"]
    assert len({row["synthesis_key"] for row in rows}) == 1


def test_shapes_are_drawn_for_every_kind_of_teacher(tmp_path):
    images = {"method": "shapes", "batch_size": 8}
    make_teacher(tmp_path / "t", num_classes=4)
    config = config_of(
        tmp_path / "t", synthesis=images, **{"reference.synthesis": images, "reference.mixed_with": "shapes"}
    )
    row = trial.run(config, bundles.load(str(tmp_path / "t"))).row
    assert row["status"] == "finished" and np.isfinite(row["reference_kl"])


def test_what_images_are_not_mixed_with_cannot_be_chosen():
    plain = {"teacher": "t", "reference": {"mixed": False, "mixed_with": "shapes"}}
    with pytest.raises(ValueError, match=r"mixed_with acts with mixed=true only; leave it out or set mixed=true"):
        validate(TrialConfig, plain)
    validate(TrialConfig, {"teacher": "t", "reference": {"mixed": False, "mixed_with": "images"}})
