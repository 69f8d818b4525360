"""Networks that take signals (n, channels, length) go the whole way, from synthesis to distillation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dfkd_ray
from dfkd_ray import bundles, losses, models
from dfkd_ray.batches import Batch
from dfkd_ray.cli import inputs
from dfkd_ray.compression import pruning
from dfkd_ray.images import PixelSpace, class_grid, flip_images, shift_images
from dfkd_ray.records import operators
from helpers import TINY_SETS, refusal

SHAPE, CLASSES = (2, 40), 3
DESCRIBED = {"input_shape": SHAPE, "num_classes": CLASSES, "mean": 0.5, "std": 0.25}


class Net(nn.Module):
    """Two convolutions over signals, with BatchNorm; `view` needs contiguous outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv1d(2, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8)
        self.second, self.fc = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8 * 20, CLASSES)

    def forward(self, x):
        assert x.ndim == 3
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(self.second(x)).view(len(x), -1))


@pytest.mark.parametrize("shape", ["input_shape", "image_shape"])
def test_a_network_of_signals_is_recovered(shape):
    described = {**DESCRIBED, shape: DESCRIBED["input_shape"]}
    if shape == "image_shape":
        del described["input_shape"]
    test = [Batch(0, np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8), np.arange(6) % CLASSES, "t")]
    done = dfkd_ray.recover(Net(), sparsity=0.8, settings=TINY_SETS, test=test, progress=False, **described)
    assert done.row["status"] == "finished" and done.row["achieved_sparsity"] == pytest.approx(0.8, abs=0.01)
    assert done.images.shape == (8, *SHAPE) and done.row["recovered_accuracy"] is not None
    assert done.student(torch.randn(4, *SHAPE)).shape == (4, CLASSES)


def test_convolutions_of_signals_are_pruned():
    network = Net()
    pruning.apply(network, pruning.masks(network, pruning.PruningConfig(sparsity=0.9)))
    assert bool((network.conv.weight == 0).any()) and pruning.achieved_sparsity(network) > 0.89


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "timm:resnet10t", "timm:test_vit", "torchvision:resnet18"])
def test_a_network_by_name_refuses_a_shape_of_signals(name):
    refusal(lambda: models.build(name, {}, num_classes=3, image_shape=SHAPE), "takes images", "2x40")


def test_signals_move_along_their_one_axis_and_keep_their_direction():
    signals = torch.arange(1.0, 41).expand(16, 1, 1, 40)
    moved = shift_images(signals, 3, torch.zeros(1, 1, 1, 1), torch.Generator().manual_seed(0))
    assert (moved.amax(dim=(1, 2, 3)) >= 37).all() and not torch.equal(moved, signals)
    assert torch.equal(flip_images(signals, torch.Generator().manual_seed(0)), signals)


@pytest.mark.parametrize("shape", [(4, 1, 1, 9), (4, 3, 9, 1), (4, 3, 1, 1), (4, 3, 9), (4, 3, 1)])
def test_an_axis_of_length_one_adds_nothing_to_the_total_variation(shape):
    images = torch.randn(shape)
    expected = sum(images.diff(dim=axis).abs().mean() for axis in range(2, len(shape)) if shape[axis] > 1)
    torch.testing.assert_close(losses.total_variation(images), torch.as_tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"groups": 2}]
)
def test_the_operator_of_a_convolution_of_signals_is_the_layer_and_its_adjoint(options):
    layer = nn.Conv1d(4, 6, 3, bias=False, **options).double()
    operator = operators.layer_operator(layer, (4, 15), torch.float64)
    x = torch.randn(5, 4, 15, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(operator.forward(x), expected)
    y = torch.randn_like(expected)
    torch.testing.assert_close((operator.forward(x) * y).sum(), (x * operator.adjoint(y)).sum())


def test_a_picture_of_signals_has_curves():
    signals = np.random.default_rng(0).integers(0, 256, (9, 2, 1, 40), np.uint8)
    space = PixelSpace((0.5,) * 2, (0.25,) * 2)
    picture = class_grid([Batch(0, signals, np.arange(9) % 3, "k")], 3, space, per_class=3)
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert pixels.shape[0] > 3 * 40 and 0.01 < (pixels < 200).mean() < 0.5


def test_a_bundle_of_the_old_name_has_the_same_hash():
    info = {"architecture": "resnet8", "num_classes": 3, "mean": (0.5,), "std": (0.25,)}
    old, new = (bundles.BundleInfo.model_validate({**info, name: (1, 8, 8)}) for name in ("image_shape", "input_shape"))
    assert bundles.teacher_hash(old) == bundles.teacher_hash(new) and old.image_shape == (1, 8, 8)


def test_a_data_set_of_images_is_refused_for_signals(tmp_path):
    teacher = bundles.Teacher.from_network(Net(), **DESCRIBED)
    for opened in (inputs.open_for, inputs.training_split):
        named = {"train": False} if opened is inputs.open_for else {}
        refusal(lambda opened=opened, named=named: opened(teacher, "mnist", tmp_path, download=False, **named), "2x40")
    assert inputs.open_test(teacher, "auto", tmp_path) is None


@pytest.mark.parametrize(
    ("shape", "labels", "says"),
    [
        ((6, 2, 41), np.arange(6) % CLASSES, "images of 2x41, the network takes 2x1x40"),
        ((6, 3, 40), np.arange(6) % CLASSES, "images of 3x40"),
        ((6, 2, 40), np.arange(6) % CLASSES + 1, "labels from 1 to 3"),
        ((6, 2, 40), np.eye(6, CLASSES, dtype=int), "a class for each image"),
        ((6, 2, 40), np.arange(5) % CLASSES, "labels of shape (5,)"),
    ],
)
def test_test_data_that_does_not_fit_is_refused_before_anything_is_made(shape, labels, says):
    test = [Batch(0, np.zeros(shape, np.uint8), labels, "t")]
    refusal(lambda: dfkd_ray.recover(Net(), settings=TINY_SETS, test=test, progress=False, **DESCRIBED), says)
