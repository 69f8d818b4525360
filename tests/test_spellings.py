"""One network, several spellings of its BatchNorm: the images, and the row of the recovery, do not depend on them."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dfkd_ray
from dfkd_ray import batchnorm, bundles, results, synthesis
from dfkd_ray.config import DeepInversionConfig
from dfkd_ray.results import schemas
from helpers import CPU, TINY_SETS, randomise_statistics

SHAPE, CLASSES = (3, 12, 12), 5
DESCRIBED = {"input_shape": SHAPE, "num_classes": CLASSES, "mean": (0.49, 0.48, 0.45), "std": 0.25}
# Of the network's hash, and so of how its code is spelled.
OF_THE_HASH = {"trial_id", "teacher_hash", "synthesis_key"}
STEPS = {"num_steps": 6, "batch_size": 8, "num_threads": 1}


class Inside(nn.BatchNorm2d):
    """Its ReLU is in it, as in timm's BatchNormAct2d."""

    def forward(self, input):
        return torch.relu(super().forward(input))


class InPlace(nn.BatchNorm2d):
    """Its ReLU overwrites its output, as timm's does too."""

    def forward(self, input):
        return super().forward(input).relu_()


class Before(nn.BatchNorm2d):
    """It changes its input first: twice the half."""

    def forward(self, input):
        return torch.relu(super().forward((input + input) / 2))


class Own(nn.BatchNorm2d):
    """It has an arithmetic of its own, in eval mode and while it trains."""

    def forward(self, input):
        assert self.running_mean is not None and self.running_var is not None
        mean, variance = self.running_mean, self.running_var
        if self.training:
            assert self.momentum is not None
            variance, mean = torch.var_mean(input, dim=(0, 2, 3), correction=0)
            num = input.numel() / input.shape[1]
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * num / (num - 1), self.momentum)
        x = (input - mean[:, None, None]) / (variance[:, None, None] + self.eps).sqrt()
        return torch.relu(x * self.weight[:, None, None] + self.bias[:, None, None])


class Net(nn.Module):
    """Two convolutions, each with a normalisation, and a ReLU that some normalisations have inside."""

    def __init__(self, normalisation: Callable[[int], nn.BatchNorm2d], activation: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, CLASSES)
        self.bn1, self.bn2, self.activation = normalisation(8), normalisation(8), activation
        randomise_statistics(self)

    def forward(self, x):
        x = self.activation(self.bn1(self.first(x)))
        return self.fc(self.activation(self.bn2(self.second(x))).mean(dim=(2, 3)))


def teachers(spelling):
    """The network with plain layers, and spelled otherwise; one hash, of which all random numbers are a function."""
    plain = bundles.Teacher.from_network(Net(nn.BatchNorm2d, nn.ReLU()), **DESCRIBED)
    other = bundles.Teacher.from_network(Net(spelling, nn.Identity()), **DESCRIBED)
    assert plain.hash != other.hash and other.network.state_dict().keys() == plain.network.state_dict().keys()
    return plain, replace(other, hash=plain.hash)


def made(teacher, **settings):
    """The images of a batch, and its terms."""
    batch = synthesis.source(teacher, DeepInversionConfig(**STEPS, **settings), CPU)[1](0)
    return batch.images, batch.terms


def rows(spelling, **settings):
    """The rows of the recoveries of both networks, as a table holds them."""
    longer = {"synthesis.num_steps": 4, "distillation.num_steps": 6, "reference.num_images": 32, **settings}
    done = [
        dfkd_ray.recover(teacher, sparsity=0.5, settings={**TINY_SETS, **longer}, progress=False)
        for teacher in teachers(spelling)
    ]
    return [results.kept(each.row) for each in done]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("spelling", [Inside, InPlace])
def test_images_are_the_same_bytes_wherever_the_activation_stands(spelling, precision):
    plain, other = teachers(spelling)
    (images, terms), (others, other_terms) = made(plain, precision=precision), made(other, precision=precision)
    assert images.tobytes() == others.tobytes() and terms["bn"] == other_terms["bn"]
    assert images.tobytes() != made(plain, precision=precision, bn_weight=0.0)[0].tobytes()


@pytest.mark.parametrize("spelling", [Inside, InPlace])
def test_the_row_of_a_recovery_is_the_same_wherever_the_activation_stands(spelling):
    plain, other = rows(spelling)
    columns = [name for name in schemas.deterministic_columns() if name not in OF_THE_HASH]
    assert plain["status"] == "finished" and plain["bn_reestimated_agreement"] is not None
    assert {name: plain.get(name) for name in columns} == {name: other.get(name) for name in columns}


@pytest.mark.parametrize("spelling", [Before, Own])
def test_images_of_another_arithmetic_are_near(spelling):
    plain, other = teachers(spelling)
    exact = {"precision": "float32", "storage": "float32"}
    (images, terms), (others, other_terms) = made(plain, **exact), made(other, **exact)
    np.testing.assert_allclose(images, others, atol=1e-3)
    assert terms["bn"] == pytest.approx(other_terms["bn"], rel=1e-3)


@pytest.mark.parametrize("spelling", [Before, Own])
def test_the_row_of_another_arithmetic_is_within_noise(spelling):
    exact = {f"{part}.precision": "float32" for part in ("synthesis", "reference.synthesis", "distillation")}
    plain, other = rows(spelling, **exact)
    assert plain["status"] == other["status"] == "finished"
    counts = ("achieved_sparsity", "num_nonzero", "num_images", "class_histogram")
    assert [plain[name] for name in counts] == [other[name] for name in counts]
    # Compressed: it depends on the values.
    assert plain["stored_bytes"] == pytest.approx(other["stored_bytes"], rel=0.01)
    for name in ("image_bn", "image_confidence"):
        assert plain[name] == pytest.approx(other[name], rel=0.02), name
    # Reconstruction sets no statistics of a layer that does not call F.batch_norm: the teacher's stay.
    assert plain["reference_kl"] == pytest.approx(other["reference_kl"], rel=0.1, abs=1e-6)
    for name in ("pruned_agreement", "bn_reestimated_agreement", "reconstructed_agreement", "agreement"):
        assert abs(plain[name] - other[name]) <= 1 / 32, name


def test_every_spelling_is_recorded():
    for spelling in (Inside, InPlace, Before, Own):
        batchnorm.check_recording(teachers(spelling)[1].network, SHAPE)


class Frozen(nn.BatchNorm2d):
    """It keeps its statistics while all else is trained."""

    def forward(self, input):
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def test_statistics_that_a_layer_keeps_are_not_reset():
    network, images = Net(Frozen, nn.ReLU()), torch.randn(8, *SHAPE)
    expected = network.eval()(images)
    batchnorm.reestimate(network, [images])
    torch.testing.assert_close(network(images), expected)


def test_reestimation_does_not_depend_on_the_spelling_and_is_pytorch_s_average():
    batches = [torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    plain, own = Net(nn.BatchNorm2d, nn.ReLU()), Net(Own, nn.Identity())
    plain.bn2, own.bn2 = plain.bn1, own.bn1
    for network in (plain, own):
        batchnorm.reestimate(network, batches)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(plain.bn1.get_buffer(name), own.bn1.get_buffer(name), rtol=1e-4, atol=1e-5)
    assert plain.bn1.num_batches_tracked == 6
    whole = copy.deepcopy(plain)
    whole.bn1.reset_running_stats()
    whole.bn1.momentum = None  # PyTorch's own cumulative average
    whole.bn1.train()
    with torch.no_grad():
        for images in batches:
            whole(images)
    assert torch.equal(whole.bn1.get_buffer("running_var"), plain.bn1.get_buffer("running_var"))
