"""One whole trial: the row, the student, and what a trial refuses."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_ray import batchnorm, bundles, evaluation, ladder, models, results, trial
from dfkd_ray.batches import Batch
from dfkd_ray.compression import layerwise, moments, pruning
from dfkd_ray.config import FROM_IMAGES, TrialConfig, validate
from dfkd_ray.trial import rungs
from dfkd_ray.trial.row import pass_columns
from helpers import TINY_NOISE, randomise_statistics, same_weights, tiny_trial

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
    for rung in ("teacher", "pruned", "bn_reestimated", "reconstructed", "recovered"):
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
    settings = {"pruning.sparsity": 0.7, "distillation.num_steps": 0, "reconstruction.num_images": 0}
    config = config_of(tiny_teacher, **settings)
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


RECONSTRUCTED = ("reconstructed_accuracy", "reconstructed_agreement", "reconstruction_wall_s")


def test_reconstruction_is_a_rung_of_its_own_and_without_distillation_the_student(teacher, tiny_teacher):
    settings = {"pruning.sparsity": 0.8, "distillation.num_steps": 0, "reconstruction.num_images": 64}
    outcome = trial.run(config_of(tiny_teacher, **settings), teacher, trial.Inputs(test=a_test_set()))
    row, plain = outcome.row, trial.run(config_of(tiny_teacher, **settings | {"reconstruction.num_images": 0}), teacher)
    assert row["selected"] == "reconstructed" and row["best_step"] == 0 and row["warnings"] != ""
    assert row["reconstructed_accuracy"] == row["recovered_accuracy"]
    assert row["reconstructed_agreement"] == row["agreement"] and row["reconstruction_wall_s"] > 0
    assert row["reference_kl"] < 0.5 * plain.row["reference_kl"], "of the best of the other rungs"
    assert outcome.student is not None
    assert pruning.achieved_sparsity(outcome.student) == plain.row["achieved_sparsity"]


@pytest.mark.parametrize(
    "settings",
    [
        {"reconstruction.num_images": 0},
        {"student": {"architecture": "wrn_10_1"}},
        {"pruning.schedule": "cubic"},
        {"distillation.bn_mode": "frozen"},
        {"pruning.sparsity": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_where_reconstruction_is_left_out_its_columns_are_null(teacher, tiny_teacher, settings):
    config = config_of(tiny_teacher, **{"pruning.sparsity": 0.5} | settings)
    row = trial.run(config, teacher, trial.Inputs(test=a_test_set())).row
    assert row["status"] == "finished" and row["selected"] != "reconstructed"
    assert [row.get(name) for name in RECONSTRUCTED] == [None, None, None]
    assert row["pruned_accuracy"] is not None and "reconstruction" not in (row["warnings"] or "")


def test_a_network_that_cannot_be_reconstructed_has_no_such_rung_and_its_row_says_why(tiny_teacher):
    class Handwritten(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T + self.bias

    torch.manual_seed(0)
    parts = (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(*parts, Handwritten(8 * 144, 10))
    about = {"image_shape": (1, 16, 16), "num_classes": 10, "mean": 0.5, "std": 0.25}
    found = bundles.Teacher.from_network(network, **about)
    outcome = trial.run(config_of(tiny_teacher, **{"pruning.sparsity": 0.5}), found, trial.Inputs(test=a_test_set()))
    row = outcome.row
    assert row["status"] == "finished" and row["selected"] != "reconstructed"
    assert [row.get(name) for name in RECONSTRUCTED] == [None, None, None]
    assert "no layer-wise reconstruction: its teacher's logits change" in row["warnings"]


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("nearer", [True, False])
def test_of_the_criterions_weights_and_those_chosen_anew_the_nearer_stay(
    teacher, tiny_teacher, monkeypatch, trusted, nearer
):
    settings = {"pruning.sparsity": 0.8, "distillation.num_steps": 0, "reconstruction.num_images": 64}
    kept = trial.run(config_of(tiny_teacher, **settings, **{"reconstruction.reselect": False}), teacher)
    compare, fit, asked, fits = evaluation.Reference.compare, layerwise.reconstruct, [], []
    # Pruned, BatchNorm re-estimated, the weights chosen anew, the same on the images that they were fitted to, and the
    # criterion's, which are fitted only if the two before are too far apart.
    kls = [1.0, 1.0, 0.1, 0.1 / (3 if trusted else 5), 0.2 if nearer else 0.05]

    def compared(self, network):
        asked.append(network)
        agreement, kl = compare(self, network)
        return agreement, kls[len(asked) - 1] if len(asked) <= len(kls) - trusted else kl

    def counted(*args, **given):
        fits.append(given["selection"])
        return fit(*args, **given)

    monkeypatch.setattr(evaluation.Reference, "compare", compared)
    monkeypatch.setattr(layerwise, "reconstruct", counted)
    both = trial.run(config_of(tiny_teacher, **settings), teacher)
    chosen = trusted or nearer
    assert len(fits) == (1 if trusted else 2)
    assert both.row["achieved_sparsity"] == kept.row["achieved_sparsity"]
    assert ("the criterion's weights stay" in (both.row["warnings"] or "")) is not chosen
    fitted = [name for name in pruning.prunable(teacher.network) if not same(both, kept, name)]
    assert bool(fitted) is chosen


# KL divergences of: pruned, BatchNorm re-estimated, the criterion's weights fitted, others chosen anew and fitted.
@pytest.mark.parametrize(
    ("kls", "fits", "steps"),
    [
        ([1.0, 0.04], [], 0),
        ([0.04, 1.0], [], 0),
        ([1.0, 0.5, 0.04], [False], 0),
        ([1.0, 0.5, 0.06, 0.04], [False, True], 0),
        ([1.0, 0.5, 0.06, 0.055], [False, True], 2),
        ([1.0, 0.5, 0.055, 0.06], [False, True], 2),
    ],
)
def test_a_repair_that_is_near_enough_ends_there(teacher, tiny_teacher, monkeypatch, kls, fits, steps):
    compare, fit, found = evaluation.Reference.compare, layerwise.reconstruct, []
    known = {}  # what has been said of a network is said again: a fitted one is measured twice

    def compared(self, network):
        agreement, kl = compare(self, network)
        if kl not in known and len(known) < len(kls):
            known[kl] = kls[len(known)]
        return agreement, known.get(kl, kl)

    def counted(*args, selection, **given):
        found.append(selection is not None)
        return fit(*args, selection=selection, **given)

    settings = {"pruning.sparsity": 0.8, "distillation.num_steps": 2, "reconstruction.num_images": 64}
    plain = trial.run(config_of(tiny_teacher, **settings), teacher)
    monkeypatch.setattr(evaluation.Reference, "compare", compared)
    monkeypatch.setattr(layerwise, "reconstruct", counted)
    monkeypatch.setattr(rungs, "kl_on", lambda *_: 1.0)  # not on the reference set
    outcome = trial.run(config_of(tiny_teacher, **settings, enough_kl=0.05), teacher)
    assert found == fits
    assert (outcome.row["reconstructed_agreement"] is None) == (not fits)
    assert outcome.epochs[-1]["step"] == steps
    assert outcome.row["num_student_passes"] == plain.row["num_student_passes"] * steps // 2


@pytest.mark.parametrize("structure", ["unstructured", "n_of_m", "channels"])
def test_a_row_says_that_a_repair_ended_early_whatever_is_removed(teacher, tiny_teacher, structure):
    settings = {"pruning.sparsity": 0.5, "pruning.structure": structure, "enough_kl": 100.0}
    outcome = trial.run(config_of(tiny_teacher, **settings), teacher)
    assert outcome.epochs[-1]["step"] == 0 and ladder.ended_early(outcome.row)
    assert "training on the images" not in str(outcome.row["warnings"])


def test_a_kl_that_rounding_makes_negative_ends_no_repair_by_default(teacher, tiny_teacher, monkeypatch):
    monkeypatch.setattr(evaluation.Reference, "compare", lambda *_: (1.0, -1e-9))
    outcome = trial.run(config_of(tiny_teacher, **{"pruning.sparsity": 0.8, "distillation.num_steps": 2}), teacher)
    assert outcome.row["reconstructed_agreement"] is not None and outcome.epochs[-1]["step"] == 2


def test_where_only_the_chosen_weights_cannot_be_fitted_the_criterions_stay_and_the_row_says_so(
    teacher, tiny_teacher, monkeypatch
):
    settings = {"pruning.sparsity": 0.8, "distillation.num_steps": 0, "reconstruction.num_images": 64}
    fit = layerwise.reconstruct

    def failing(*args, selection, **given):
        if selection is not None:
            raise ValueError("fc.weight would not be finite")
        return fit(*args, selection=selection, **given)

    monkeypatch.setattr(layerwise, "reconstruct", failing)
    row = trial.run(config_of(tiny_teacher, **settings), teacher).row
    assert row["reconstructed_agreement"] is not None
    reason = "no layer-wise reconstruction: fc.weight would not be finite"
    assert f"reconstruction.reselect: the criterion's weights stay: {reason}" in row["warnings"]
    told = trial.run(config_of(tiny_teacher, **settings, **{"reconstruction.reselect": False}), teacher).row["warnings"]
    assert "reselect" not in (told or "")


def same(one, other, name):
    return torch.equal(one.student.get_parameter(name) == 0, other.student.get_parameter(name) == 0)


def test_fewer_images_than_wanted_are_told_and_so_are_layers_left_out(teacher, tiny_teacher, monkeypatch):
    settings = {"pruning.sparsity": 0.5, "reconstruction.num_images": 64}
    assert "layer-wise" not in (trial.run(config_of(tiny_teacher, **settings), teacher).row["warnings"] or "")
    monkeypatch.setattr(layerwise, "MEMORY", 1 << 10)
    monkeypatch.setattr(moments, "LARGEST", 8 * 144**2)
    told = trial.run(config_of(tiny_teacher, **settings), teacher).row["warnings"]
    assert "layer-wise reconstruction took 16 of 64 images" in told
    assert "layer-wise reconstruction left out" in told and "conv2.weight" in told and "fc.weight" not in told


@pytest.mark.parametrize("criterion", FROM_IMAGES)
def test_criteria_that_score_with_images_reach_the_sparsity(teacher, tiny_teacher, criterion):
    settings = {"pruning.criterion": criterion, "pruning.sparsity": 0.8}
    rows = [trial.run(config_of(tiny_teacher, **settings), teacher).row for _ in range(2)]
    total = sum(weight.numel() for weight in pruning.prunable(teacher.network).values())
    assert rows[0]["achieved_sparsity"] == round(0.8 * total) / total
    columns = results.deterministic_columns()
    assert {c: rows[0].get(c) for c in columns} == {c: rows[1].get(c) for c in columns}


def test_layers_that_such_a_criterion_cannot_score_are_told(teacher, tiny_teacher, monkeypatch):
    monkeypatch.setattr(moments, "LARGEST", 8 * 144**2)
    settings = {"pruning.criterion": "wanda", "pruning.sparsity": 0.8, "reconstruction.num_images": 0}
    told = trial.run(config_of(tiny_teacher, **settings), teacher).row["warnings"]
    assert "pruning.criterion=wanda sees no inputs, or too many, of " in told and "conv2.weight" in told


@pytest.mark.parametrize("criterion", ["lamp", "obs"])
def test_a_trial_that_is_stopped_and_resumed_gives_the_same_row(teacher, tiny_teacher, tmp_path, criterion):
    settings = {"pruning.criterion": criterion, "pruning.sparsity": 0.7, "distillation.num_steps": 6}
    settings |= {"distillation.eval_every": 1, "distillation.checkpoint_every": 1}
    config, inputs = config_of(tiny_teacher, **settings), trial.Inputs(test=a_test_set())

    def stop(stage, done, *_rest):
        if (stage, done) == ("distilling", 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(config, teacher, inputs, checkpoint=tmp_path, observer=trial.Observer(progress=stop))
    assert list(tmp_path.glob("t-*/*.safetensors"))
    resumed, undisturbed = trial.run(config, teacher, inputs, checkpoint=tmp_path), trial.run(config, teacher, inputs)
    columns = results.deterministic_columns()
    assert {c: resumed.row.get(c) for c in columns} == {c: undisturbed.row.get(c) for c in columns}
    assert resumed.student is not None and undisturbed.student is not None
    assert same_weights(resumed.student, undisturbed.student)


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
    tiny += ["reference.synthesis.batch_size=4", "reference.synthesis.num_steps=1", "reconstruction.num_images=16"]
    # Two threads that wait for each other take ten times as long as one does.
    tiny += [f"{part}.num_threads=1" for part in ("synthesis", "distillation", "reference.synthesis")]
    sets = [word for field in tiny for word in ("--set", field)]
    done = run_cli("recover", str(tmp_path / "t"), "--sparsity", "0.9", "--out", str(tmp_path / "out"), *sets)
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "out" / "row.json").read_text())
    assert 0 <= row["reconstructed_agreement"] <= 1 and "layer-wise" not in (row["warnings"] or "")
    assert row["achieved_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert row["stored_bytes"] < 0.7 * row["dense_bytes"]  # at this width BatchNorm is half of the file
    assert (tmp_path / "out" / "images.png").stat().st_size > 0
    assert bundles.load(str(tmp_path / "out" / "student")).info.architecture == family


# Networks that are here and networks of timm: with what arguments, on images of which size, and what the row says if
# they cannot run beside their teacher.
FROM_ELSEWHERE = {
    "resnet20": ({"width_multiplier": 0.25}, (1, 16, 16), None),
    "wrn_10_1": ({}, (1, 16, 16), None),
    "hinton_800": ({}, (1, 8, 8), None),
    "lenet5": ({}, (1, 32, 32), None),
    "lenet5_half": ({}, (1, 32, 32), None),
    "timm:test_resnet": ({}, (3, 32, 32), None),
    "timm:test_byobnet": ({}, (3, 32, 32), None),
    "timm:test_efficientnet": ({}, (3, 32, 32), None),
    "timm:test_efficientnet_gn": ({}, (3, 32, 32), None),
    "timm:test_convnext": ({}, (3, 32, 32), None),
    "timm:test_vit": ({"img_size": 32}, (3, 32, 32), None),
    "timm:mobilenetv3_small_050": ({}, (3, 32, 32), None),
    "timm:densenet121": ({"growth_rate": 8, "block_config": [2, 2]}, (3, 32, 32), None),
    "timm:test_vit_relpos": ({"img_size": 32}, (3, 32, 32), "rel_pos.mlp.fc1.weight has an input of"),
}


@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_networks_of_every_kind_are_reconstructed_or_their_row_says_why_not(name, monkeypatch):
    arguments, shape, says = FROM_ELSEWHERE[name]
    torch.manual_seed(0)
    network = models.build(name, arguments, num_classes=10, image_shape=shape)
    randomise_statistics(network)
    teacher = bundles.Teacher.from_network(network, image_shape=shape, num_classes=10, mean=0.5, std=0.25)
    distances, compare = [], evaluation.Reference.compare

    def compared(reference, student):
        found = compare(reference, student)
        distances.append((reference, found[1]))
        return found

    monkeypatch.setattr(evaluation.Reference, "compare", compared)
    settings = {"distillation.num_steps": 0, "reference.num_images": 32, "reconstruction.num_images": 64}
    settings |= {"synthesis": TINY_NOISE, "reference.synthesis": TINY_NOISE, "pruning.sparsity": 0.5}
    row = trial.run(validate(TrialConfig, tiny_trial("t", **settings)), teacher).row
    warnings = row["warnings"] or ""
    on_reference = [kl for own, kl in distances if own is distances[0][0]]
    assert row["status"] == "finished" and row["reference_kl"] == min(on_reference)
    if says is not None:
        assert row["reconstructed_agreement"] is None and "no layer-wise reconstruction: " in warnings
        assert says in warnings
    else:
        assert 0 <= row["reconstructed_agreement"] <= 1 and "layer-wise" not in warnings
        if batchnorm.layers(network):  # untrained networks without it give nearly constant logits
            assert on_reference[2] < 0.5 * min(on_reference[:2])


def test_passes_count_each_step_of_each_batch_and_the_distillation():
    rows = [{"num_steps": 2, "num_teacher_passes": 16, "num_student_passes": 0}] * 2
    assert pass_columns(rows, 10) == {"num_teacher_passes": 42, "num_student_passes": 10}
    assert pass_columns([{"num_steps": None}], 10) == {"num_teacher_passes": 10, "num_student_passes": 10}
    of_older_cache = {"num_steps": 2}
    assert pass_columns([*rows, of_older_cache], 10) == {"num_teacher_passes": None, "num_student_passes": None}
