"""The package as a Python library: what it exports, and one network recovered in memory."""

import doctest
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import dfkd_ray
from dfkd_ray import recovery
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher

QUICK = {
    "bn_num_images": 16,
    "device": "cpu",
    **{f"synthesis.{name}": value for name, value in {"batch_size": 8, "num_steps": 2, "num_threads": 1}.items()},
    **{f"distillation.{name}": value for name, value in {"num_images": 16, "num_steps": 3, "batch_size": 8}.items()},
    **{f"{name}.num_threads": 1 for name in ("distillation", "reference.synthesis")},
    **{f"reference.synthesis.{name}": value for name, value in {"batch_size": 8, "num_steps": 1}.items()},
    "reference.num_images": 8,
    "reconstruction.num_images": 16,
}
SHAPE: Any = {"image_shape": (3, 32, 32), "num_classes": 10, "mean": (0.5, 0.5, 0.5), "std": 0.25}


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_a_notebook_goes_from_a_torchvision_network_in_memory_to_a_recovered_one(capfd):
    torch.manual_seed(0)
    # ---- what stands in the notebook
    network = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25)
    done = dfkd_ray.recover(
        network, image_shape=(3, 32, 32), num_classes=10, mean=0.5, std=0.25, sparsity=0.9, settings=QUICK
    )
    student, row = done.student, done.row
    # ----
    assert isinstance(student, torchvision.models.MobileNetV2) and student is not network and not student.training
    weights = [
        w for m in student.modules() if isinstance(m, nn.Conv2d | nn.Linear) for w in m.weight.detach().flatten()
    ]
    assert sum(float(w) == 0.0 for w in weights) / len(weights) == pytest.approx(0.9, abs=1e-3)
    assert row["status"] == "finished" and done.images.shape == (16, 3, 32, 32) and done.images.dtype == np.uint8
    assert student(torch.zeros(2, 3, 32, 32)).shape == (2, 10) and len(done.labels) == 16
    assert "distilling 3/3" in capfd.readouterr().err, "progress is shown"


def test_progress_is_off_by_one_argument_and_the_network_is_not_touched(capfd):
    network = small_network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    done = dfkd_ray.recover(network, **SHAPE, settings=QUICK, progress=False)
    told = capfd.readouterr()
    assert told.out == told.err == ""
    assert network.training and all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    again = dfkd_ray.recover(network, **SHAPE, settings=QUICK, progress=False)
    assert done.row["images_sha256"] == again.row["images_sha256"] and done.row["trial_id"] == again.row["trial_id"]
    ours, theirs = done.student.state_dict(), again.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_networks_in_memory_have_two_hashes_and_two_synthesis_keys():
    first, second = small_network(0), small_network(1)
    strided = small_network(0)
    strided[0].stride = (2, 2)  # type: ignore[assignment]
    teachers = [Teacher.from_network(network, **SHAPE) for network in (first, second, strided, small_network(0))]
    hashes = [teacher.hash for teacher in teachers]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]
    other = Teacher.from_network(first, **SHAPE | {"mean": 0.4})
    assert other.hash not in hashes


@pytest.mark.parametrize("array", [np.array, torch.tensor, list])
def test_numbers_of_a_description_may_be_arrays_and_tensors(array):
    plain = Teacher.from_network(small_network(), **SHAPE | {"mean": (0.5, 0.25, 0.125)})
    given = {"mean": array([0.5, 0.25, 0.125]), "std": array([0.25, 0.25, 0.25]), "num_classes": 10}
    assert Teacher.from_network(small_network(), input_shape=array([3, 32, 32]), **given).hash == plain.hash
    scalars = {"mean": np.float32(0.5), "std": torch.tensor(0.25)}
    assert Teacher.from_network(small_network(), **SHAPE | scalars).info.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["input_shape", "num_classes", "mean", "std"])
def test_what_is_not_said_of_a_network_is_asked_for_and_what_nothing_takes_is_refused(name):
    said: Any = {"input_shape": (3, 32, 32), "num_classes": 10, "mean": 0.5, "std": 0.25}
    kept: Any = {other: value for other, value in said.items() if other != name}
    for take in (Teacher.from_network, dfkd_ray.recover):
        with pytest.raises(ValueError, match=f"^a network in memory needs {name}: say what images it takes$"):
            take(small_network(), **kept)
        with pytest.raises(TypeError, match="unexpected keyword argument 'maen': expected input_shape, "):
            take(small_network(), **said | {"maen": 0.5})


def test_what_is_no_network_and_no_batch_is_refused_by_its_type():
    for given, says in (
        (small_network().state_dict(), "of type OrderedDict"),
        (nn.Linear, "the class Linear"),
        (len, "of type builtin_function"),
    ):
        with pytest.raises(ValueError, match=f"network is {says}.*: expected an nn.Module"):
            recovery.check_network(given)
    with pytest.raises(ValueError, match=r"expected a list of dfkd_ray.batches.Batch, got a tuple"):
        recovery.checked_batches([([0], [0])])
    with pytest.raises(ValueError, match=r"expected a list of dfkd_ray.batches.Batch, got a value of type int"):
        recovery.checked_batches(3)


def batch_of(*shape):
    return Batch(0, np.zeros((2, *shape), np.uint8), np.zeros(2, np.int64), "x")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"image_shape": (3, 32, 32)}, "needs num_classes, mean, std"),
        ({**SHAPE, "num_classes": 7}, "expected \\(1, 7\\): check the class count"),
        ({**SHAPE, "mean": (0.5, 0.5)}, "mean has 2"),
        ({**SHAPE, "image_shape": 32}, "input_shape: expected channels, height and width"),
        ({**SHAPE, "image_shape": (1, 3, 32, 32)}, "input_shape: expected channels, height and width"),
        ({**SHAPE, "test": [batch_of(3, 16, 16)]}, "images of 3x16x16, the network takes 3x32x32"),
        ({**SHAPE, "image_shape": (1, 32, 32)}, "mean has 3"),
        ({**SHAPE, "std": 0.0}, "std must be above 0"),
        ({**SHAPE, "sparsity": 1.5}, "pruning.sparsity"),
        ({**SHAPE, "settings": {"distillation.steps": 3}}, "unknown field"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given, says):
    with pytest.raises(ValueError, match=says) as caught:
        dfkd_ray.recover(small_network(), **given, progress=False)
    assert len(str(caught.value).splitlines()) == 1


def test_a_description_beside_a_bundle_and_a_failed_recovery_are_errors(tiny_teacher):
    with pytest.raises(ValueError, match="of a network in memory only"):
        dfkd_ray.recover(str(tiny_teacher), num_classes=10)
    with pytest.raises(RuntimeError, match="FloatingPointError"):
        dfkd_ray.recover(str(tiny_teacher), settings={**QUICK, "synthesis.bn_weight": 1e38}, progress=False)


def test_the_package_exports_what_it_says_and_importing_it_loads_nothing_heavy():
    assert all(getattr(dfkd_ray, name) is not None for name in dfkd_ray.__all__)
    assert set(dfkd_ray.__all__) <= set(dir(dfkd_ray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dfkd_ray.nothing
    code = "import sys, dfkd_ray; print(sorted({'torch', 'ray', 'numpy', 'pydantic', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_the_docstrings_run():
    done = doctest.testmod(recovery, optionflags=doctest.ELLIPSIS)
    assert done.attempted >= 6 and done.failed == 0
