"""A trial keeps the best of its rungs, fails where it is not what was asked for, and warns of what looks wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dfkd_ray
from dfkd_ray import bundles, evaluation, trial
from dfkd_ray.bundles.doubts import doubts
from dfkd_ray.compression import pruning
from dfkd_ray.config import TrialConfig, validate, with_overrides
from dfkd_ray.distillation import Pool
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.trial import rungs
from dfkd_ray.trial.warnings import warnings_of
from helpers import TINY_SETS, make_teacher, same_weights, tiny_network, tiny_trial

ONE_FIT = {"pruning.sparsity": 0.5, "reconstruction.reselect": False}  # so that each rung is compared once
DESCRIBED = {"image_shape": (1, 16, 16), "num_classes": 10, "mean": 0.5, "std": 0.25}


def recovered(**settings):
    return dfkd_ray.recover(tiny_network(), settings={**TINY_SETS, **settings}, progress=False, **DESCRIBED)


# ---- which rung ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """(agreement, KL) of every comparison on the reference set, in order: the rungs before training, each look.

    No fit is trusted: layers are fitted twice.
    """
    found, references, real = [], [], evaluation.Reference.compare

    def compare(reference, network):
        references.append(reference)
        measured = real(reference, network)
        if reference is references[0]:  # the others are the images that layers were fitted to
            found.append(measured)
        return measured

    monkeypatch.setattr(evaluation.Reference, "compare", compare)
    monkeypatch.setattr(rungs, "MOST_TIMES_FARTHER", -1.0)
    return found


@pytest.mark.parametrize("bn_mode", ["trained", "frozen", "reestimated"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_no_student_is_farther_from_the_teacher_than_plain_pruning_or_any_look(bn_mode, sparsity, compared):
    done = recovered(
        **{"pruning.sparsity": sparsity, "distillation.bn_mode": bn_mode, "distillation.learning_rate": 5.0}
    )
    agreements, distances = zip(*compared, strict=True)
    has_rung = bn_mode != "frozen" and sparsity > 0
    said = "two rungs, two fits and the nearer again where layers are reconstructed, and two looks"
    assert len(distances) == 4 + 3 * has_rung, said
    assert done.row["reference_kl"] == min(distances)
    assert done.row["agreement"] in [a for a, kl in compared if kl == min(distances)]
    measured = {"pruned": 0, "bn_reestimated": 1} | ({"reconstructed": 4} if has_rung else {})
    assert {rung: done.row[f"{rung}_agreement"] for rung in measured} == {r: agreements[i] for r, i in measured.items()}
    assert not has_rung or distances[4] == min(distances[2:4])


def test_of_students_that_agree_alike_the_one_of_lowest_kl_is_kept(monkeypatch):
    of_rungs = {
        "recovered": [3.0, 2.0, 2.0, 2.5, 1.0],
        "pruned": [1.0, 2.0, 2.0, 2.5, 3.0],
        "bn_reestimated": [2.0, 1.0, 3.0, 2.5, 3.0],
        "reconstructed": [2.0, 3.0, 1.0, 2.5, 3.0],
    }
    for selected, distances in of_rungs.items():
        told = iter(distances)
        monkeypatch.setattr(evaluation.Reference, "compare", lambda *_arguments, told=told: (0.875, next(told)))
        row = recovered(**ONE_FIT).row
        assert (row["selected"], row["reference_kl"], row["agreement"]) == (selected, 1.0, 0.875)


def test_a_student_of_higher_agreement_and_higher_kl_is_not_kept(monkeypatch):
    told = iter([(0.9, 3.0), (0.95, 2.0), (0.8, 2.0), (1.0, 2.5), (0.5, 1.0)])
    monkeypatch.setattr(evaluation.Reference, "compare", lambda *_arguments: next(told))
    row = recovered(**ONE_FIT).row
    assert (row["selected"], row["best_step"], row["reference_kl"], row["agreement"]) == ("recovered", 2, 1.0, 0.5)


@pytest.mark.parametrize("enough_kl", [0.0, 1e6])
def test_a_new_student_is_never_the_one_with_its_first_random_weights(enough_kl):
    fields = {
        "student.architecture": "resnet8",
        "student.arguments": {"width_multiplier": 0.5},
        "pruning.sparsity": 0.0,
    }
    ruined = {"distillation.learning_rate": 1e3, "distillation.clip_norm": 1e3, "enough_kl": enough_kl}
    row = recovered(**fields, **ruined).row
    assert row["selected"] == "recovered" and row["best_step"] > 0
    assert recovered(**fields, **{"distillation.num_steps": 0}).row["best_step"] == 0, "none is trained"


def test_where_training_ruins_a_student_the_pruned_one_is_kept_and_said():
    settings = {"pruning.sparsity": 0.3, "distillation.learning_rate": 50.0, "distillation.clip_norm": 100.0}
    settings["reconstruction.num_images"] = 0
    done = recovered(**settings)
    assert done.row["selected"] == "pruned" and done.row["best_step"] == 0
    network = tiny_network()
    pruning.apply(network, pruning.masks(network, pruning.PruningConfig(sparsity=0.3)))
    assert same_weights(network, done.student)
    assert "plain pruning" in done.row["warnings"]


# ---- what was asked for ----------------------------------------------------------------------------------------------


class Restores(nn.Module):
    """Gives its convolution other weights in every forward pass of several images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)
        self.register_buffer("own", torch.randn(4, 1, 3, 3))

    def forward(self, x):
        if len(x) > 1:
            self.conv.weight.data.copy_(self.get_buffer("own"))
        return self.fc(self.bn(self.conv(x)).mean(dim=(2, 3)))


def test_a_trial_whose_sparsity_is_not_the_one_asked_for_has_failed():
    teacher = bundles.Teacher.from_network(Restores(), **DESCRIBED)
    config = validate(TrialConfig, tiny_trial("t", **{"pruning.sparsity": 0.9}))
    outcome = trial.run(config, teacher)
    assert outcome.row["status"] == "failed" and "instead of pruning.sparsity=0.9" in outcome.row["reason"]
    assert outcome.student is None


# ---- numbers of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "bn_num_images"), [(8, 24), (24, 8), (16, 16)])
def test_distillation_uses_the_images_of_its_own_field(num_images, bn_num_images):
    done = recovered(**{"distillation.num_images": num_images, "bn_num_images": bn_num_images})
    assert done.row["num_images"] == num_images == len(done.images)


def test_a_network_without_batchnorm_makes_no_images_for_it(tmp_path):
    teacher = make_teacher(tmp_path / "t")
    settings = {**TINY_SETS, "bn_num_images": 64, "synthesis.method": "noise", "reference.synthesis.method": "noise"}
    settings = {name: value for name, value in settings.items() if not name.endswith("synthesis.num_steps")}
    settings = {name: value for name, value in settings.items() if not name.endswith("synthesis.num_threads")}
    config = validate(TrialConfig, with_overrides({"teacher": "t"}, settings))
    outcome = trial.run(config, teacher)
    assert sum(row["domain"] == "train" for row in outcome.synthesis) == 1


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "batch_size", "num_batches"), [(10, 16, 5), (10, 8, 5), (1000, 256, 6), (7, 3, 8)]
)
def test_labels_reach_every_class_as_evenly_as_their_number_allows(num_classes, batch_size, num_batches):
    labels = torch.cat([SOFTMAX.labels("0123456789abcdef", i, batch_size, num_classes) for i in range(num_batches)])
    for end in range(1, len(labels) + 1, 13):
        counts = torch.bincount(labels[:end], minlength=num_classes)
        assert int(counts.max()) - int(counts.min()) <= 1


def test_few_images_of_many_classes_are_not_the_first_classes_and_follow_the_key():
    first, other = (SOFTMAX.labels(key * 16, 0, 64, 1000) for key in "ab")
    assert int(first.max()) > 700 and not torch.equal(first, other)
    assert torch.equal(first, SOFTMAX.labels("a" * 16, 0, 64, 1000))


# ---- warnings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def of_images(tmp_path):
    teacher = make_teacher(tmp_path / "t", num_classes=3)

    def found(
        labels=(0, 1, 2),
        agreement=1.0,
        confidence=0.9,
        histogram="[10, 10, 10]",
        about=(),
        num_steps=1,
        agreed=0.5,
        **row,
    ):
        architecture = row.pop("architecture", None)
        config = validate(TrialConfig, tiny_trial("t", **{"student.architecture": architecture}))
        labels = np.array(labels * 10)
        pool = Pool(np.zeros((len(labels), 1, 32, 32), np.uint8), labels)
        row = {"class_histogram": histogram, "image_confidence": confidence, "selected": "recovered", **row}
        row["agreement"] = agreed
        other = replace(teacher, info=teacher.info.model_copy(update={"trained": True, **dict(about)}))
        return list(warnings_of(config, other, row, [{"label_agreement": agreement, "num_steps": num_steps}], pool))

    return found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"agreement": 0.04}, "4% of the images"),
        ({"labels": (0, 1)}, "1 of 3 classes have no image"),
        ({"histogram": "[30, 0, 0]"}, "predicts 2 of 3 classes for none"),
        ({"confidence": 0.35}, "not sure"),
        ({"selected": "pruned"}, "plain pruning is closest"),
        ({"architecture": "resnet8", "agreed": 0.1, "pruned_agreement": 0.1}, "it has learned nothing"),
        ({"num_steps": 0}, "of an untrained generator: use another method"),
    ],
)
def test_each_warning_says_what_is_wrong(of_images, changes, says):
    assert of_images() == []
    (warning,) = of_images(**changes)
    assert says in warning


TWO = {"num_classes": 2}
LABELS = {"head": "sigmoid"}  # three, each drawn with a chance of one half


@pytest.mark.parametrize(
    ("about", "changes", "says"),
    [
        (TWO, {"confidence": 0.8, "histogram": "[20, 10]", "labels": (0, 1), "teacher_accuracy": 0.65}, None),
        (TWO, {"confidence": 0.7, "histogram": "[20, 10]", "labels": (0, 1)}, "not sure"),
        (TWO, {"histogram": "[20, 10]", "labels": (0, 1), "teacher_accuracy": 0.55}, "near chance"),
        ({}, {"teacher_accuracy": 0.52}, None),
        ({}, {"teacher_accuracy": 0.48}, "near chance"),
        (LABELS, {"teacher_accuracy": 0.65, "confidence": 0.8, "agreement": 0.8}, None),
        (LABELS, {"teacher_accuracy": 0.55}, "near chance"),
        (LABELS, {"confidence": 0.7}, "not sure"),
        (LABELS, {"agreement": 0.7}, "70% of the labels"),
        (LABELS, {"histogram": "[30, 0, 0]"}, "predicts 2 of 3 labels for none"),
    ],
)
def test_what_guessing_reaches_depends_on_classes_and_head(of_images, about, changes, says):
    found = of_images(about=about.items(), **changes)
    assert len(found) == (0 if says is None else 1) and all(str(says) in warning for warning in found)


def test_a_student_of_random_weights_is_not_called_trained(tmp_path):
    for name, trained in (("random", False), ("trained", True)):
        teacher = make_teacher(tmp_path / name, "resnet8", (1, 16, 16))
        teacher = replace(teacher, info=teacher.info.model_copy(update={"trained": trained}))
        outcome = trial.run(validate(TrialConfig, tiny_trial("t")), teacher)
        assert outcome.student_info is not None and outcome.student_info.trained == trained


def test_noise_of_independent_labels_is_judged_by_their_own_probabilities():
    network = tiny_network()
    with torch.no_grad():
        network.get_parameter("fc.bias").fill_(20.0)  # equal classes, and labels that are all sure
    found = [bundles.Teacher.from_network(network, **DESCRIBED, head=head) for head in ("softmax", "sigmoid")]
    assert [any("sure of noise" in doubt for doubt in doubts(teacher)) for teacher in found] == [False, True]


def test_warnings_are_printed_below_the_ladder(run_cli, tiny_teacher, tmp_path):
    words = [word for name, value in TINY_SETS.items() for word in ("--set", f"{name}={value}")]
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "out"), *words)
    assert done.code == 0 and "warning: " in done.out
