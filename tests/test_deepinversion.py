"""Synthesis: random access, determinism, and that it optimises what it says."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd_ray import batches, batchnorm, bundles, devices, images, models, synthesis, trial
from dfkd_ray.config import DeepInversionConfig, NoiseConfig, TrialConfig, parse_synthesis, validate
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.synthesis import deepinversion
from dfkd_ray.synthesis.optimiser import Aim

CPU = torch.device("cpu")
SMALL = DeepInversionConfig(batch_size=8, num_steps=3, num_threads=1)


@pytest.fixture
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


def batch_of(teacher: bundles.Teacher, config: DeepInversionConfig, index: int = 0) -> batches.Batch:
    return synthesis.source(teacher, config, CPU)[1](index)


def test_batch_7_alone_equals_batch_7_after_the_others_in_another_process(tiny_teacher: Path, teacher: bundles.Teacher):
    program = (
        "import sys, json, torch\n"
        "from dfkd_ray import bundles, cache, synthesis\n"
        "from dfkd_ray.config import DeepInversionConfig\n"
        "_, batch = synthesis.source(bundles.load(sys.argv[1]),\n"
        "    DeepInversionConfig(batch_size=8, num_steps=3, num_threads=1), torch.device('cpu'))\n"
        "made = [batch(index) for index in range(8)]\n"
        "print(json.dumps(cache.digest(7, made[7].images, made[7].labels)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_teacher)], capture_output=True, text=True, timeout=900, check=True
    )
    from dfkd_ray import cache

    alone = batch_of(teacher, SMALL, 7)
    assert cache.digest(7, alone.images, alone.labels) == json.loads(done.stdout)


@pytest.mark.parametrize("parametrisation", ["pyramid", "pixel"])
def test_synthesis_lowers_the_loss_it_minimises(teacher: bundles.Teacher, parametrisation: str):
    # Statistics of real-looking images: a random teacher's own are out of reach of any image.
    network = deepcopy(teacher.network)
    blobs = F.interpolate(torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)), size=(16, 16))
    batchnorm.reestimate(network, [blobs])
    teacher = replace(teacher, network=bundles.freeze(network))
    config = SMALL.model_copy(
        update={"batch_size": 32, "num_steps": 40, "parametrisation": parametrisation, "bn_weight": 0.1}
    )
    start, end = (batch_of(teacher, config.model_copy(update={"num_steps": n})).terms for n in (1, 40))
    assert end["bn"] * 0.1 + end["label"] < 0.8 * (start["bn"] * 0.1 + start["label"])


def test_the_teacher_is_bit_identical_after_synthesis(teacher: bundles.Teacher):
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    batch_of(teacher, SMALL)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.network.state_dict().items())
    assert not teacher.network.training


def test_labels_are_balanced_over_consecutive_batches(teacher: bundles.Teacher):
    labels = np.concatenate([batch_of(teacher, SMALL, index).labels for index in range(5)])
    assert np.bincount(labels, minlength=10).tolist() == [4] * 10


def test_the_reference_domain_has_other_images_than_training(teacher: bundles.Teacher):
    (key, train), (other_key, held_out) = (synthesis.source(teacher, SMALL, CPU, d) for d in ("train", "reference"))
    assert key != other_key
    assert not np.array_equal(train(0).images, held_out(0).images)


def test_images_stay_in_the_pixel_range_and_measure_as_stored(teacher: bundles.Teacher):
    batch = batch_of(teacher, SMALL.model_copy(update={"storage": "float32", "learning_rate": 5.0}))
    assert batch.images.min() >= 0.0 and batch.images.max() <= 1.0
    decoded = images.decode(batch.images, teacher.info.space)
    with torch.no_grad(), devices.autocast("bfloat16", CPU):
        logits = teacher.network(decoded).float()
    assert batch.terms["class_histogram"] == torch.bincount(logits.argmax(1), minlength=10).tolist()


FLOATS = SMALL.model_copy(update={"storage": "float32"})


@pytest.fixture(scope="module")
def unchanged(tiny_teacher: Path) -> np.ndarray:
    """The images of a batch whose settings are not changed."""
    return batch_of(bundles.load(str(tiny_teacher)), FLOATS).images


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"bn_weight": 3.0},
        {"bn_first_multiplier": 5.0},
        {"label_loss": "entropy"},
        {"label_weight": 9.0},
        {"tv_weight": 5.0},
        {"l2_weight": 5.0},
        {"jitter": 0},
        {"flip": False},
        {"schedule": "constant"},
        {"learning_rate": 0.5},
        {"parametrisation": "pixel"},
        {"precision": "float32"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_changes_the_images(teacher: bundles.Teacher, unchanged: np.ndarray, change: dict):
    assert not np.array_equal(unchanged, batch_of(teacher, FLOATS.model_copy(update=change)).images)


def with_statistics(teacher: bundles.Teacher, mean: float, variance: float) -> bundles.Teacher:
    """The teacher with the same running mean and variance in all channels."""
    network = deepcopy(teacher.network)
    for layer in batchnorm.layers(network):
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(variance)
    return replace(teacher, network=bundles.freeze(network))


@pytest.mark.parametrize("method", ["deepinversion", "adi"])
def test_the_batchnorm_weight_goes_by_the_size_of_the_teachers_statistics(teacher: bundles.Teacher, method: str):
    asked = parse_synthesis({"method": method})
    sizes = sum(layer.num_features**0.5 for layer in batchnorm.layers(teacher.network))
    for mean, variance in ((0.0, 1.0), (-3.0, 4.0), (0.0, 1e-3), (0.0, 0.0)):
        own = synthesis.pinned(with_statistics(teacher, mean, variance), asked)
        expected = deepinversion.BN_SIZE / max(1.0, (abs(mean) + variance) * sizes)
        assert own.bn_weight == pytest.approx(expected, rel=0.05) and own.bn_weight == float(f"{own.bn_weight:.2g}")
        assert synthesis.pinned(teacher, own) == own, "a number stays"
    given = asked.model_copy(update={"bn_weight": 0.0})
    assert synthesis.pinned(teacher, given) == given


def test_a_trial_and_its_reference_have_the_number_that_the_weight_stands_for(teacher: bundles.Teacher):
    config = trial.pinned(validate(TrialConfig, {"teacher": "t"}), teacher)
    own = synthesis.pinned(teacher, DeepInversionConfig())
    assert (config.synthesis, config.reference.synthesis) == (own, own)
    given = {"synthesis": own.model_dump(), "reference": {"synthesis": own.model_dump()}}
    as_given = trial.pinned(validate(TrialConfig, {"teacher": "t", **given}), teacher)
    assert trial.trial_id(config, teacher) == trial.trial_id(as_given, teacher)


def test_plateau_stops_before_the_last_step(teacher: bundles.Teacher):
    config = SMALL.model_copy(update={"num_steps": 400, "plateau_patience": 1, "learning_rate": 1e-9})
    assert batch_of(teacher, config).terms["num_steps"] < 400


def test_a_network_without_batchnorm_is_refused_and_told_about_records():
    network = bundles.freeze(nn.Sequential(nn.Flatten(), nn.Linear(16, 10)))
    info = bundles.BundleInfo(architecture="x:y", num_classes=10, input_shape=(1, 4, 4), mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"no BatchNorm layer.*activation records"):
        synthesis.source(bundles.Teacher(network, info, "0" * 64, "plain"), SMALL, CPU)


def test_a_loss_that_is_not_finite_is_an_error_that_says_so(teacher: bundles.Teacher):
    config = SMALL.model_copy(update={"bn_weight": 1e38})
    with pytest.raises(FloatingPointError, match="loss is"):
        batch_of(teacher, config)


def test_batchnorm_1d_networks_can_be_teachers():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    info = bundles.BundleInfo(architecture="x:y", num_classes=10, input_shape=(1, 4, 4), mean=(0.5,), std=(0.5,))
    batch = batch_of(bundles.Teacher(bundles.freeze(network), info, "0" * 64, "mlp"), SMALL)
    assert batch.images.shape == (8, 1, 4, 4) and batch.terms["bn"] > 0


def test_without_a_compiler_compile_says_so_and_goes_on(teacher, monkeypatch, caplog):
    monkeypatch.setattr(deepinversion.shutil, "which", lambda _name: None)
    config = SMALL.model_copy(update={"compile": True})
    with caplog.at_level("WARNING"):
        batch = batch_of(teacher, config)
    assert "no C++ compiler" in caplog.text and batch.images.shape == (8, 1, 16, 16)


def test_first_batchnorm_multiplier_scales_the_first_layer_only(teacher: bundles.Teacher):
    x = torch.rand(8, 1, 16, 16)
    values = []
    with batchnorm.recorded(teacher.network) as statistics:
        logits = teacher.network(x)
        for factor in (0.0, 1.0, 2.0):
            config = SMALL.model_copy(update={"bn_first_multiplier": factor})
            values.append(
                float(deepinversion.terms(config, x, logits, Aim(torch.arange(8), SOFTMAX), statistics)["bn"])
            )
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-4)
    assert values[0] > 0 and values[1] > values[0]


def test_noise_has_the_teachers_mean_and_no_labels(teacher: bundles.Teacher):
    batch = synthesis.source(teacher, NoiseConfig(batch_size=64), CPU)[1](0)
    normalised = images.decode(batch.images, teacher.info.space)
    assert abs(float(normalised.mean())) < 0.05 and 0.8 < float(normalised.std()) < 1.0
    assert (batch.labels == batches.NO_LABEL).all()


def test_wrn_as_teacher_has_a_smaller_bn_term_on_images_than_on_noise():
    torch.manual_seed(0)
    network = models.build("wrn_10_1", {}, num_classes=10, image_shape=(3, 16, 16))
    info = bundles.BundleInfo(
        architecture="wrn_10_1", num_classes=10, input_shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    teacher = bundles.Teacher(bundles.freeze(network), info, "0" * 64, "wrn")
    start, end = (batch_of(teacher, SMALL.model_copy(update={"num_steps": n})).terms["bn"] for n in (1, 30))
    assert end < start


def test_a_batch_that_turns_nan_is_started_again_the_same_way_everywhere(
    teacher: bundles.Teacher, monkeypatch: pytest.MonkeyPatch
):
    real, calls = deepinversion.invert, []

    def turns_nan(network, run, config, *arguments):
        calls.append(config.learning_rate)
        if len(calls) % 3 == 1:
            raise FloatingPointError("synthesis: the loss is nan at step 3")
        return real(network, run, config, *arguments)

    undisturbed = batch_of(teacher, SMALL, 5)
    monkeypatch.setattr(deepinversion, "invert", turns_nan)
    first = batch_of(teacher, SMALL, 5)
    calls.append(0.0)
    second = batch_of(teacher, SMALL, 5)
    assert first.terms["num_attempts"] == second.terms["num_attempts"] == 2
    assert undisturbed.terms["num_attempts"] == 1
    np.testing.assert_array_equal(first.images, second.images)
    assert (first.images != undisturbed.images).any() and (first.labels == undisturbed.labels).all()
    assert calls[:2] == [SMALL.learning_rate, SMALL.learning_rate / 2]


def test_a_batch_that_stays_nan_fails_and_says_how_often_it_was_tried(teacher: bundles.Teacher):
    with pytest.raises(FloatingPointError, match=r"attempt 3 of 3"):
        batch_of(teacher, SMALL.model_copy(update={"bn_weight": 1e38}))
