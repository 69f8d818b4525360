"""BatchNorm paired with the teacher's: what a student computes in training, and what its statistics become."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from dfkd_ray import batchnorm, bundles, pairing, trial
from dfkd_ray.compression import channels
from dfkd_ray.config import TrialConfig, validate
from helpers import tiny_trial


class Doubled(nn.BatchNorm2d):
    """A subclass that does more than BatchNorm in its own `forward`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class TwiceNormed(nn.Module):
    """One BatchNorm layer that runs twice, on different inputs; a subclass of BatchNorm; one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.doubled = nn.BatchNorm2d(6), Doubled(6)
        self.plain = nn.BatchNorm1d(6, affine=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.doubled(self.norm(self.second(x))).relu()
        return self.head(self.plain(x.mean((2, 3))))


@pytest.fixture
def teacher() -> nn.Module:
    """A network whose running statistics are not those of the images that it is given."""
    torch.manual_seed(0)
    network = TwiceNormed()
    for layer in batchnorm.layers(network):
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.3, 3)
    return network.requires_grad_(False).eval()


def outputs(student: nn.Module, teacher: nn.Module, images: torch.Tensor, **given: Any) -> tuple[Any, Any]:
    """The teacher's logits, and the student's in training with paired statistics."""
    found = None, None
    with pairing.paired(student, teacher, **given) as pairs:
        for _ in range(2):  # as in every step of a distillation
            pairs.seen.clear()
            theirs = teacher(images)
            with pairs:
                found = theirs, student(images)
    return found


def test_a_student_that_equals_its_teacher_computes_the_same_in_training_and_keeps_its_statistics(teacher):
    student = deepcopy(teacher).train()
    before = {name: buffer.clone() for name, buffer in student.named_buffers() if name.endswith(("_mean", "_var"))}
    images = 3 + 2 * torch.randn(16, 3, 8, 8)
    theirs, own = outputs(student, teacher, images)
    assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(deepcopy(student)(images), theirs, atol=0.1), "with the batch's own statistics"
    for name, buffer in before.items():
        assert torch.allclose(student.get_buffer(name), buffer, rtol=1e-4, atol=1e-4), name


def test_a_layers_statistics_are_the_students_moved_as_the_teachers_are(teacher):
    student = deepcopy(teacher).train().requires_grad_(True)
    with torch.no_grad():
        student.first.weight.mul_(1.5).add_(0.1)
    images = torch.randn(16, 3, 8, 8)
    mean, variance = batchnorm.channel_moments(student.first(images).detach())
    batch_mean, batch_variance = batchnorm.channel_moments(teacher.first(images))
    ratio = ((variance + 1e-5) / (batch_variance + 1e-5)).sqrt()
    expected = mean + (teacher.norm.running_mean - batch_mean) * ratio
    seen = []
    student.norm.register_forward_hook(
        lambda layer, given, output: seen.append((given[0], output, layer.running_mean.clone()))
    )
    student.norm.momentum = None  # the average of all calls: the first call sets the statistics
    student.norm.reset_running_stats()
    with pairing.paired(student, teacher) as pairs:
        teacher(images)
        with pairs:
            student(images)
    scale = (teacher.norm.running_var + 1e-5).sqrt() * ratio
    wanted = (seen[0][0] - expected[:, None, None]) / scale[:, None, None]
    assert torch.allclose(seen[0][1], wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(seen[0][2], expected, rtol=1e-4, atol=1e-4) and student.norm.num_batches_tracked == 2


def test_the_gradient_is_that_of_the_same_formula_by_autograd(teacher):
    torch.manual_seed(1)
    given = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    theirs = [torch.randn(6).double(), torch.rand(6).double() + 0.5, torch.randn(6).double(), torch.rand(6).double()]

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        buffers = {"running_mean": torch.zeros(6).double(), "running_var": torch.ones(6).double()}
        given = {"input": x, "weight": weight, "bias": bias, "momentum": 0.1, "eps": 1e-5, **buffers}
        return pairing.normalised(given, (theirs[0], theirs[1]), (theirs[2], theirs[3]))

    inputs = (given, torch.rand(6).double() + 0.5, torch.randn(6).double())
    assert torch.autograd.gradcheck(run, tuple(each.requires_grad_(True) for each in inputs))


def test_of_a_student_with_fewer_channels_those_are_paired_that_it_has(tiny_teacher):
    fields = {"pruning.structure": "channels", "pruning.sparsity": 0.4, "distillation.num_steps": 0}
    found = bundles.load(tiny_teacher)
    outcome = trial.run(validate(TrialConfig, tiny_trial(tiny_teacher, **fields)), found)
    assert outcome.student_info is not None and outcome.student_info.shape_edits
    kept = {edit.module: tuple(edit.kept) for edit in outcome.student_info.shape_edits if edit.dimension == "out"}
    # A student that is a slice of its teacher, whose other channels give nothing: both compute the same.
    teacher = deepcopy(found.network)
    for name, layer in teacher.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and name in kept:
            lost = [channel for channel in range(layer.num_features) if channel not in kept[name]]
            with torch.no_grad():
                layer.weight[lost], layer.bias[lost] = 0.0, 0.0
    student = channels.sliced(teacher, outcome.student_info.shape_edits).train()
    theirs, own = outputs(student, teacher.eval(), torch.randn(8, *found.info.image_shape), kept=kept)
    assert torch.allclose(own, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"pruning.structure": "channels", "pruning.sparsity": 0.4}, "paired"),
        ({"pruning.structure": "channels", "pruning.sparsity": 0.4, "distillation.bn_mode": "trained"}, "trained"),
        ({"pruning.structure": "channels", "pruning.sparsity": 0.0}, "trained"),
        ({"pruning.sparsity": 0.5}, "trained"),
        ({"pruning.sparsity": 0.5, "distillation.bn_mode": "paired"}, "paired"),
        ({"student.architecture": "resnet8", "student.arguments": {"width_multiplier": 0.25}}, "trained"),
    ],
)
def test_the_row_says_what_auto_stands_for_and_is_that_of_the_mode_by_its_name(tiny_teacher, fields, mode):
    found = bundles.load(tiny_teacher)
    row = trial.run(validate(TrialConfig, tiny_trial(tiny_teacher, **fields)), found).row
    assert row["status"] == "finished" and row["distillation.bn_mode"] == mode
    named = validate(TrialConfig, tiny_trial(tiny_teacher, **fields | {"distillation.bn_mode": mode}))
    assert trial.provenance(trial.pinned(named, found), found)["trial_id"] == row["trial_id"]
