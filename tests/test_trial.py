"""One whole trial: the row, the student, and what a trial refuses."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_ray import bundles, evaluation, results, trial
from dfkd_ray.batches import Batch
from dfkd_ray.compression import pruning
from dfkd_ray.config import TrialConfig, validate
from helpers import tiny_trial

FIELDS = {"synthesis.num_steps": 2, "distillation.num_images": 16, "distillation.num_steps": 3}
FIELDS |= {"distillation.eval_every": 2}
FAMILIES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "wide_resnet50_2",
    "mobilenet_v2",
    "vgg19_bn",
    "densenet121",
    "shufflenet_v2_x1_0",
]


def config_of(teacher: str | Path, **overrides) -> TrialConfig:
    return validate(TrialConfig, tiny_trial(teacher, **FIELDS | overrides))


def a_test_set(num_images: int = 20) -> list[Batch]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (num_images, 1, 16, 16), dtype=np.uint8)
    return [Batch(0, images, rng.integers(0, 10, num_images), "test")]


@pytest.fixture
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


def test_a_trial_fills_its_row_and_its_student_has_the_sparsity(teacher, tiny_teacher, tmp_path):
    outcome = trial.run(config_of(tiny_teacher, **{"pruning.sparsity": 0.9}), teacher, trial.Inputs(test=a_test_set()))
    row = outcome.row
    assert row["status"] == "finished" and not row["real_data"] and row["num_images"] == 16
    for rung in ("teacher", "pruned", "bn_reestimated", "recovered"):
        assert 0 <= row[f"{rung}_accuracy"] <= 1
    assert row["num_test_images"] == 20 and sum(json.loads(row["class_histogram"])) == 16
    total = sum(weight.numel() for weight in pruning.prunable(teacher.network).values())
    assert row["achieved_sparsity"] == round(0.9 * total) / total
    outcome.save_student(tmp_path / "student")
    assert (tmp_path / "student" / "weights.safetensors").stat().st_size == row["stored_bytes"]
    assert row["stored_bytes"] < 0.5 * row["dense_bytes"]
    loaded = bundles.load(str(tmp_path / "student"))
    assert isinstance(loaded.network, nn.Module)
    assert pruning.achieved_sparsity(loaded.network) == row["achieved_sparsity"]


def test_without_test_data_accuracies_are_null_and_agreement_is_there(teacher, tiny_teacher):
    row = trial.run(config_of(tiny_teacher), teacher).row
    assert row.get("recovered_accuracy") is None and row["num_test_images"] is None
    assert 0 <= row["agreement"] <= 1


def test_selection_and_student_do_not_depend_on_test_data(teacher, tiny_teacher):
    with_test = trial.run(config_of(tiny_teacher), teacher, trial.Inputs(test=a_test_set()))
    without = trial.run(config_of(tiny_teacher), teacher)
    assert with_test.row["best_step"] == without.row["best_step"]
    assert with_test.student is not None and without.student is not None
    other = without.student.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in with_test.student.state_dict().items())


def test_the_same_config_gives_the_same_deterministic_row(teacher, tiny_teacher, tmp_path):
    rows = [
        trial.run(config_of(tiny_teacher), teacher, trial.Inputs(test=a_test_set(), images=trial.Local(folder))).row
        for folder in (None, tmp_path, tmp_path)
    ]
    assert [row["num_cached_batches"] for row in rows] == [0, 0, 2]
    columns = results.deterministic_columns()
    assert all({c: row.get(c) for c in columns} == {c: rows[0].get(c) for c in columns} for row in rows)


def test_the_whole_trial_leaves_the_teacher_bit_identical(teacher, tiny_teacher):
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    trial.run(config_of(tiny_teacher, **{"pruning.sparsity": 0.5}), teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


def test_batchnorm_reestimation_is_a_step_of_its_own_and_changes_the_student(teacher, tiny_teacher):
    config = config_of(tiny_teacher, **{"pruning.sparsity": 0.7, "distillation.num_steps": 0})
    outcome = trial.run(config, teacher, trial.Inputs(test=a_test_set()))
    assert outcome.row["selected"] == "bn_reestimated"
    assert outcome.row["bn_reestimated_accuracy"] == outcome.row["recovered_accuracy"]
    assert outcome.student is not None
    buffers = dict(teacher.network.named_buffers())
    moved = [
        not torch.equal(buffer, buffers[name])
        for name, buffer in outcome.student.named_buffers()
        if name.endswith("running_mean")
    ]
    assert all(moved)


@pytest.mark.parametrize("mode", ["frozen", "reestimated"])
def test_other_batchnorm_modes_run(teacher, tiny_teacher, mode, monkeypatch):
    distances = itertools.count(100, -1)
    monkeypatch.setattr(evaluation.Reference, "compare", lambda *_arguments: (1.0, float(next(distances))))
    outcome = trial.run(config_of(tiny_teacher, **{"distillation.bn_mode": mode}), teacher)
    assert outcome.row["status"] == "finished" and outcome.student is not None
    assert (outcome.row["selected"], outcome.row["best_step"]) == ("recovered", 3), "the last look is the closest"
    theirs = dict(teacher.network.named_buffers())
    kept = [torch.equal(b, theirs[n]) for n, b in outcome.student.named_buffers() if n.endswith("running_var")]
    assert all(kept) == (mode == "frozen")


def test_noise_is_a_method_and_real_needs_an_injected_source(teacher, tiny_teacher):
    assert trial.run(config_of(tiny_teacher, synthesis={"method": "noise", "batch_size": 8}), teacher).row["status"]
    config = config_of(tiny_teacher, synthesis={"method": "real", "batch_size": 8})
    with pytest.raises(ValueError, match="hand them in"):
        trial.run(config, teacher)
    rng = np.random.default_rng(0)

    def real(index: int) -> Batch:
        return Batch(index, rng.integers(0, 256, (8, 1, 16, 16), dtype=np.uint8), np.arange(8), "real")

    assert trial.run(config, teacher, trial.Inputs(real=real)).row["real_data"] is True


def test_real_images_are_not_used_unless_the_config_asks(teacher, tiny_teacher):
    def real(index: int) -> Batch:
        raise AssertionError("real data was read")

    assert trial.run(config_of(tiny_teacher), teacher, trial.Inputs(real=real)).row["real_data"] is False


def test_another_architecture_can_be_the_student_pruned_or_not(teacher, tiny_teacher, tmp_path):
    overrides = {"student": {"architecture": "wrn_10_1"}, "pruning.sparsity": 0.5}
    outcome = trial.run(config_of(tiny_teacher, **overrides), teacher)
    outcome.save_student(tmp_path / "student")
    loaded = bundles.load(str(tmp_path / "student"))
    assert loaded.info.architecture == "wrn_10_1"
    assert pruning.achieved_sparsity(loaded.network) == pytest.approx(0.5, abs=1e-4)


def test_a_new_student_with_arguments_that_is_not_pruned_has_a_row_and_its_true_size(teacher, tiny_teacher, tmp_path):
    student = {"architecture": "resnet8", "arguments": {"width_multiplier": 0.25}}
    outcome = trial.run(config_of(tiny_teacher, student=student, **{"pruning.sparsity": 0.0}), teacher)
    outcome.save_student(tmp_path / "student")
    assert outcome.row["stored_bytes"] == (tmp_path / "student" / "weights.safetensors").stat().st_size
    results.write(tmp_path, "trials", [outcome.row], "t")
    row = results.read(tmp_path, "trials").iloc[0]
    assert json.loads(row["student.arguments"]) == student["arguments"]


def test_a_student_by_import_path_needs_trust(teacher, tiny_teacher):
    config = config_of(tiny_teacher, **{"student": {"architecture": "os.path:join"}, "pruning.sparsity": 0.0})
    with pytest.raises(ValueError, match=r"`trust_code=os\.path`"):
        trial.run(config, teacher)


def test_a_nan_loss_marks_the_trial_and_the_process_lives(teacher, tiny_teacher):
    outcome = trial.run(config_of(tiny_teacher, **{"synthesis.bn_weight": 1e38}), teacher)
    assert outcome.row["status"] == "failed" and "FloatingPointError" in outcome.row["reason"]
    assert outcome.student is None


def test_trial_ids_differ_with_the_config_and_not_with_place_or_device(teacher, tiny_teacher):
    ids = {
        name: trial.trial_id(config_of(folder, **change), teacher)
        for name, folder, change in [
            ("base", tiny_teacher, {}),
            ("elsewhere", "some/where/else", {}),
            ("device", tiny_teacher, {"device": "auto"}),
            ("temperature", tiny_teacher, {"distillation.temperature": 2.0}),
        ]
    }
    assert ids["base"] == ids["elsewhere"] == ids["device"] != ids["temperature"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_recovers_at_tiny_size(family, tmp_path, run_cli):
    arguments = '{"stem": "cifar", "width_multiplier": 0.125}'
    done = run_cli("teacher", "init", family, "--out", str(tmp_path / "t"), "--arguments", arguments)
    assert done.code == 0, done.err
    tiny = ["synthesis.batch_size=4", "synthesis.num_steps=1", "distillation.num_images=4", "bn_num_images=4"]
    tiny += ["distillation.num_steps=1", "distillation.batch_size=4", "reference.num_images=4"]
    tiny += ["reference.synthesis.batch_size=4", "reference.synthesis.num_steps=1"]
    # Two threads that wait for each other take ten times as long as one does.
    tiny += [f"{part}.num_threads=1" for part in ("synthesis", "distillation", "reference.synthesis")]
    sets = [word for field in tiny for word in ("--set", field)]
    done = run_cli("recover", str(tmp_path / "t"), "--sparsity", "0.9", "--out", str(tmp_path / "out"), *sets)
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "out" / "row.json").read_text())
    assert row["achieved_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert row["stored_bytes"] < 0.7 * row["dense_bytes"]  # at this width BatchNorm is half of the file
    assert (tmp_path / "out" / "images.png").stat().st_size > 0
    assert bundles.load(str(tmp_path / "out" / "student")).info.architecture == family
