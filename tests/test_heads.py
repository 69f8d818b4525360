"""Heads: what a network's outputs mean. A sigmoid's labels are independent, from synthesis to agreement."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfkd_ray
from dfkd_ray import bundles, devices, evaluation, image_sets, synthesis
from dfkd_ray.batches import Batch
from dfkd_ray.cli import inputs
from dfkd_ray.cli.synthesize import export_of
from dfkd_ray.config import DeepInversionConfig, RecordsConfig
from dfkd_ray.heads import HEADS, SOFTMAX, Sigmoid
from dfkd_ray.images import PixelSpace
from helpers import CPU, TINY_SETS, TINY_WORDS, assert_one_error, refusal

SIGMOID = Sigmoid()
CLASSES, SHAPE = 5, (1, 40)
KEY = "0123456789abcdef"


class Labels(nn.Module):
    """A network of signals with independent labels; `last` ends it."""

    def __init__(self, last=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv1d(1, 8, 5), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
        self.last = last or nn.Identity()

    def forward(self, x):
        return self.last(self.fc(torch.relu(self.bn(self.conv(x))).mean(dim=2)))


DESCRIBED: Any = {"input_shape": SHAPE, "num_classes": CLASSES, "mean": 0.5, "std": 0.25, "head": "sigmoid"}


def logits(seed, num=6):
    return 2 * torch.randn(num, CLASSES, generator=torch.Generator().manual_seed(seed))


def bernoulli(p, q):
    """Slow reference: KL between two probabilities."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_distillation_term_of_independent_labels_is_a_sum_of_binary_divergences(temperature):
    student, teacher = logits(0), logits(1)
    s, t = ((x / temperature).double().sigmoid().numpy() for x in (student, teacher))
    expected = temperature**2 * bernoulli(t, s).sum(axis=1).mean()
    assert float(SIGMOID.kl(student, teacher, temperature)) == pytest.approx(expected, rel=1e-4)
    assert float(SIGMOID.kl(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_terms_of_a_head_are_finite_for_extreme_logits(head):
    extreme = torch.tensor([[1e4, -1e4, 0.0, 50.0, -50.0]]).requires_grad_()
    labels = head.labels(KEY, 0, 1, CLASSES)
    terms = [head.label_loss(extreme, labels), head.kl(extreme, -extreme.detach(), 4.0)]
    total = torch.stack(terms).sum()
    total.backward()
    assert total.isfinite() and extreme.grad is not None and extreme.grad.isfinite().all()


def test_targets_are_drawn_independently_and_follow_the_key():
    labels = torch.cat([SIGMOID.labels(KEY, index, 64, CLASSES) for index in range(30)])
    targets = SIGMOID.targets(labels, CLASSES)
    assert (labels >= 0).all() and len(labels.unique()) == len(labels)
    assert (targets.mean(dim=0) - 0.4).abs().max() < 0.05  # two of five are expected
    correlations = torch.corrcoef(targets.T) - torch.eye(CLASSES)
    assert correlations.abs().max() < 0.1
    assert torch.equal(targets[64:128], SIGMOID.targets(SIGMOID.labels(KEY, 1, 64, CLASSES), CLASSES))


def test_agreement_of_independent_labels_is_the_share_of_equal_ones():
    first, second = logits(0), logits(1)
    expected = ((first > 0) == (second > 0)).float().mean()
    assert SIGMOID.agreement(first, second) == pytest.approx(float(expected))
    assert SIGMOID.histogram(first) == (first > 0).sum(dim=0).tolist()


def test_mixed_labels_are_weighted_losses():
    labels, partners = SIGMOID.labels(KEY, 0, 6, CLASSES), torch.tensor([1, 2, 3, 4, 5, 0])
    weight, own = torch.linspace(0, 1, 6), SIGMOID.targets(SIGMOID.labels(KEY, 0, 6, CLASSES), CLASSES)
    soft = weight[:, None] * own + (1 - weight[:, None]) * own[partners]
    expected = F.binary_cross_entropy_with_logits(logits(0), soft, reduction="none").sum(dim=1).mean()
    torch.testing.assert_close(SIGMOID.mixed_label_loss(logits(0), labels, partners, weight), expected)


def test_a_softmaxs_mean_loss_has_pytorchs_bits():
    labels = torch.arange(6) % CLASSES
    assert torch.equal(SOFTMAX.label_loss(logits(0), labels), F.cross_entropy(logits(0), labels))


def test_synthesis_reaches_the_targets_that_it_was_asked_for():
    teacher = bundles.Teacher.from_network(Labels(), **DESCRIBED)
    terms = [
        synthesis.source(teacher, DeepInversionConfig(batch_size=32, num_steps=steps, bn_weight=0.01), CPU)[1](0).terms
        for steps in (1, 60)
    ]
    assert terms[1]["label"] < terms[0]["label"] and len(terms[1]["class_histogram"]) == CLASSES


@pytest.mark.parametrize("last", [None, nn.Sigmoid()])
def test_a_network_of_independent_labels_is_recovered(last, tmp_path):
    rng = np.random.default_rng(0)
    images, truth = rng.integers(0, 256, (8, *SHAPE), np.uint8), rng.integers(0, 2, (8, CLASSES))
    settings = {**TINY_SETS, "distillation.label_weight": 0.5}
    test = [Batch(0, images, truth, "t")]
    done = dfkd_ray.recover(Labels(last), sparsity=0.5, settings=settings, test=test, progress=False, **DESCRIBED)
    seen = (torch.from_numpy(images) / 255 - 0.5) / 0.25
    for network, column in ((Labels().eval(), "teacher_accuracy"), (done.student, "recovered_accuracy")):
        right = (network(seen).detach().numpy() > 0) == truth
        assert done.row[column] == pytest.approx(right.mean(), abs=2 / truth.size)
    assert done.row["status"] == "finished" and done.row["num_test_images"] == 8
    assert len(json.loads(done.row["class_histogram"])) == CLASSES


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.arange(8) % CLASSES, "0 or 1 for each of its independent labels"),
        (np.ones((8, CLASSES + 1), int), "expected (8, 5)"),
        (np.full((8, CLASSES), 2), "labels from 2 to 2"),
        (np.full((8, CLASSES), -1), "labels from -1"),
    ],
)
def test_test_data_without_a_mark_for_each_label_is_refused(labels, says):
    test = [Batch(0, np.zeros((8, *SHAPE), np.uint8), labels, "t")]
    refusal(lambda: dfkd_ray.recover(Labels(), settings=TINY_SETS, test=test, progress=False, **DESCRIBED), says)


# ---- from a file of weights to a student, on the command line --------------------------------------------------------


@pytest.fixture
def imported(run_cli, tmp_path, monkeypatch):
    """A bundle of a network that ends in a sigmoid; `own_heads` is its code."""
    (tmp_path / "own_heads.py").write_text(
        "from test_heads import Labels\nfrom torch import nn\ndef make(): return Labels(nn.Sigmoid())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own_heads", None)
    del sys.modules["own_heads"]
    network = Labels().train()
    for seed in range(40):
        network(torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(seed)))
    torch.save(network.state_dict(), "weights.pt")
    words = ["teacher", "import", "weights.pt", "--architecture", "own_heads:make", "--num-classes", str(CLASSES)]
    words += ["--input-shape", "1x40", "--mean", "0.5", "--std", "0.25", "--out"]
    assert_one_error(run_cli(*words, "wrong"), 2, "ends in a sigmoid", "independent labels")
    done = run_cli(*words, "net", "--independent-labels")
    assert done.code == 0 and "undone" in done.err, done
    return network.eval()


def test_independent_labels_of_signals_go_from_a_weights_file_to_a_student(run_cli, imported):
    trust = ("--trust-code", "own_heads")
    about = run_cli("teacher", "info", "net", *trust).out
    assert f"{CLASSES} independent labels" in about and "signals          1x40\n" in about
    done = run_cli("recover", "net", *trust, "--sparsity", "0.5", "--out", "out", "--cache", "cache", *TINY_WORDS)
    assert done.code == 0, done
    row = json.loads(Path("out/row.json").read_text())
    assert row["status"] == "finished" and row["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert row["test_set"] is None and row.get("recovered_accuracy") is None
    student, signals = dfkd_ray.load("out/student", ["own_heads"]), torch.randn(4, *SHAPE)
    assert (student.info.head, student.info.input_shape) == ("sigmoid", SHAPE)
    assert student.network(signals).shape == (4, CLASSES)
    torch.testing.assert_close(dfkd_ray.load("net", ["own_heads"]).network(signals), imported(signals))
    for words in (("--test-data", "mnist"), ("--method", "real", "--real-data", "mnist")):
        done = run_cli("recover", "net", *trust, "--out", "other", "--cache", "cache", *words)
        assert_one_error(done, 2, "takes signals of 1x40", "from Python")
    assert not Path("other").exists()


def test_images_of_independent_labels_are_exported_without_a_class(tmp_path):
    teacher = bundles.Teacher.from_network(Labels(), **DESCRIBED)
    batch = synthesis.source(teacher, DeepInversionConfig(batch_size=4, num_steps=1), CPU)[1](0)
    for kind in image_sets.FORMATS:
        export = export_of(teacher, DeepInversionConfig(batch_size=4, num_steps=1), tmp_path / kind, kind, 3)
        image_sets.prepare(export)
        image_sets.write(export, batch)
    assert len(list((tmp_path / "folder" / "unlabelled").iterdir())) == 3
    assert image_sets.read_part(tmp_path / "parquet" / "part-000000.parquet").labels.tolist() == [-1] * 3


def test_a_data_set_with_a_class_an_image_is_refused_for_independent_labels(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    of = {**DESCRIBED, "input_shape": (1, 16, 16), "num_classes": 3}
    teacher = bundles.Teacher.from_network(network, **of)
    says = "mnist", "one class for each image", "independent labels", "from Python"
    refusal(lambda: inputs.open_test(teacher, "mnist", tmp_path), *says)
    refusal(lambda: inputs.training_split(teacher, "mnist", tmp_path, False), *says)
    known = replace(teacher, info=teacher.info.model_copy(update={"dataset": "fashion_mnist"}))
    assert inputs.open_test(known, "auto", tmp_path) is None


@pytest.mark.parametrize(
    ("head", "truth"),
    [
        ("sigmoid", np.arange(8) % CLASSES),
        ("sigmoid", np.zeros((8, CLASSES + 1))),
        ("softmax", np.eye(CLASSES, dtype=np.int64)[np.arange(8) % CLASSES]),
        ("softmax", np.zeros(7, np.int64)),
    ],
)
def test_labels_of_another_head_are_refused(head, truth):
    network = bundles.Teacher.from_network(Labels(), **DESCRIBED | {"head": head}).network
    runtime = devices.Runtime(CPU, PixelSpace((0.5,), (0.25,)))
    test = [Batch(0, np.zeros((8, *SHAPE), np.uint8), truth, "t")]
    refusal(lambda: evaluation.accuracy(network, test, runtime, HEADS[head]), "labels of shape", str(truth.shape))


def test_records_are_per_class_and_refuse_independent_labels():
    teacher = bundles.Teacher.from_network(Labels(), **DESCRIBED)
    refusal(lambda: synthesis.check(teacher, RecordsConfig()), "independent labels", "deepinversion")


def test_the_head_is_part_of_the_hash_and_a_softmaxs_hash_is_that_of_before():
    softmax, sigmoid = (
        bundles.Teacher.from_network(Labels(), **DESCRIBED | {"head": head}) for head in ("softmax", "sigmoid")
    )
    assert softmax.hash != sigmoid.hash
