"""Small students of the eight families are exported as they are: fewer channels, zero weights, 2:4 patterns."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dfkd_ray
from dfkd_ray import batchnorm, bundles, exporting, models
from dfkd_ray.bundles import BundleInfo, Teacher
from dfkd_ray.compression import channels, pruning
from dfkd_ray.config import PruningConfig
from dfkd_ray.description import WITH_EDITS, ShapeEdit
from dfkd_ray.exporting import images
from dfkd_ray.models.torchvision_families import FAMILIES

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ARGUMENTS = {"width_multiplier": 0.125, "stem": "cifar"}
CLASSES, NUM_IMAGES = 5, 24
# Each family with one kind of pruning: finding the channels of the deepest takes ten seconds of CPU time.
AS_SOURCE = {
    **{"resnet18": "2:4", "resnet34": "masks", "resnet50": "channels", "wide_resnet50_2": "masks"},
    **{"mobilenet_v2": "channels", "vgg19_bn": "channels", "densenet121": "masks", "shufflenet_v2_x1_0": "2:4"},
}
# Conversion to ONNX takes seconds.
AS_ONNX = {"resnet18": "channels", "vgg19_bn": "masks", "shufflenet_v2_x1_0": "2:4"}


def some(shape: Sequence[int], seed: int, num: int = NUM_IMAGES) -> torch.Tensor:
    """Images of few patterns, with noise: a network that has seen no training tells them apart."""
    patterns = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))
    return patterns[torch.arange(num) % CLASSES] + 0.05 * noise


def pruned(network: nn.Module, kind: str, shape: Sequence[int]) -> tuple[nn.Module, tuple[ShapeEdit, ...]]:
    """A network with half of its parameters in channels, a tenth of its weights, or two of four neighbours."""
    if kind == "channels":
        config = PruningConfig(structure="channels", sparsity=0.5, importance="magnitude")
        edits = channels.choose(network, channels.prepare(network, shape, config.importance), config).edits
        return channels.sliced(network, edits), edits
    config = PruningConfig(sparsity=0.9)
    if kind == "2:4":
        config = PruningConfig(structure="n_of_m", sparsity=0.5)
        masks = pruning.pattern_masks(network, config)[0]
    else:
        masks = pruning.masks(network, config)
    pruning.apply(network, masks)
    return network, ()


def student(family: str, kind: str, folder: Path) -> Teacher:
    """The bundle of an untrained student, with re-estimated BatchNorm statistics and logits that differ."""
    shape = (3, 32, 32) if "vgg" in family else (1, 28, 28) if family == "resnet18" else (3, 16, 16)
    torch.manual_seed(0)
    network = models.build(family, ARGUMENTS, num_classes=CLASSES, image_shape=shape)
    network, edits = pruned(network.eval().requires_grad_(False), kind, shape)
    batchnorm.reestimate(network, [some(shape, 1), some(shape, 2)])
    info = {"architecture": family, "arguments": ARGUMENTS, "num_classes": CLASSES, "input_shape": shape}
    info |= {"mean": (0.5,) * shape[0], "std": (0.25,) * shape[0], "trained": False}
    info |= {"shape_edits": edits, "schema_version": WITH_EDITS} if edits else {}
    zeros = () if edits else tuple(pruning.prunable(network))
    bundles.save(folder, BundleInfo(**info), network.eval().state_dict(), zeros)
    return bundles.load(str(folder))


@pytest.fixture(autouse=True)
def quick_images(monkeypatch):
    """Patterns instead of synthesis."""

    def made(teacher, calibrates, *_):
        shape = teacher.info.input_shape
        return images.Images(some(shape, 3).numpy(), some(shape, 4).numpy() if calibrates else None, "patterns")

    monkeypatch.setattr(images, "made", made)


def test_all_families_are_here():
    assert set(AS_SOURCE) == set(FAMILIES) - {"vgg11_bn"} and len(AS_SOURCE) == 8
    assert set(AS_ONNX.values()) == set(AS_SOURCE.values()) == {"channels", "masks", "2:4"}


@pytest.mark.parametrize(("family", "kind"), AS_SOURCE.items())
def test_a_student_of_every_family_is_written_as_source_code_as_it_is(family, kind, tmp_path):
    teacher = student(family, kind, tmp_path / "student")
    done = dfkd_ray.export(teacher, tmp_path / "net", format="torch")
    assert done.comparison.agreement == 1.0 and done.comparison.largest_difference <= 1e-3 * done.comparison.spread
    assert done.dense_bytes == sum(4 * tensor.numel() for tensor in teacher.network.state_dict().values())


@pytest.mark.parametrize(("family", "kind"), AS_ONNX.items())
def test_a_student_is_written_as_onnx_as_it_is(family, kind, tmp_path):
    teacher = student(family, kind, tmp_path / "student")
    done = dfkd_ray.export(teacher, tmp_path / "net.onnx")
    assert done.comparison.agreement == 1.0
    run, given = exporting.FORMATS["onnx"].open(done.path), some(teacher.info.input_shape, 5, 3).numpy()
    expected = teacher.network(torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(run(given), expected, atol=1e-3 * np.abs(expected).max())
