"""Checkpoints that are damaged, or of something else: not used, said so, and the training starts anew."""

import json
import logging
import random

import pytest
import safetensors.torch
import torch

from dfkd_ray import bundles, checkpoints, distillation, distillation_state, teachers
from dfkd_ray.data import LabelledImages
from helpers import SMALL_DISTILLATION, TEACHER_TRAINING, distilled, same_weights, tiny_network


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return bundles.load(str(tiny_teacher))


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    """A student and its state from a run that was not disturbed, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    short = SMALL_DISTILLATION.model_copy(update={"num_steps": 4})
    distilled(teacher, short, checkpoint=folder)
    return *distilled(teacher, short), (folder / checkpoints.FILE).read_bytes(), short


def changed(data, change, counted=True):
    """A checkpoint with a change to its counters (a dict) and tensors (a dict), which it then counts anew."""
    plain = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["state"])
    tensors = safetensors.torch.load(data)
    change(plain, tensors)
    if counted and "num_tensors" in plain:
        plain["num_tensors"] = len(tensors)
    return safetensors.torch.save(tensors, {"state": json.dumps(plain)})


def other(tensors, name, value):
    tensors[name] = value


CHANGES = {
    "step_beyond": lambda p, t: p.update(step=99),
    "step_negative": lambda p, t: p.update(step=-2),
    "step_true": lambda p, t: p.update(step=True),
    "step_text": lambda p, t: p.update(step="2"),
    "step_fraction": lambda p, t: p.update(step=2.0),
    "best_step_beyond": lambda p, t: p.update(best_step=9),
    "agreement_text": lambda p, t: p.update(best_agreement="1"),
    "agreement_two": lambda p, t: p.update(best_agreement=2.0),
    "kl_text": lambda p, t: p.update(best_kl="low"),
    "looks_negative": lambda p, t: p.update(looks_since_best=-1),
    "another_field": lambda p, t: p.update(colour="red"),
    "a_field_less": lambda p, t: p.pop("epochs"),
    "no_looks": lambda p, t: p.update(epochs=[]),
    "looks_of_text": lambda p, t: p.update(epochs=["first"]),
    "looks_of_other_steps": lambda p, t: p["epochs"][-1].update(step=50),
    "student_less": lambda p, t: t.pop("student.fc.weight"),
    "student_more": lambda p, t: other(t, "student.more", torch.zeros(1)),
    "student_shape": lambda p, t: other(t, "student.fc.weight", torch.zeros(3, 3)),
    "student_kind": lambda p, t: other(t, "student.fc.weight", t["student.fc.weight"].double()),
    "student_nan": lambda p, t: t["student.fc.weight"].fill_(float("nan")),
    "best_less": lambda p, t: t.pop("best.fc.weight"),
    "best_gone": lambda p, t: [t.pop(name) for name in list(t) if name.startswith("best.")],
    "best_shape": lambda p, t: other(t, "best.fc.bias", torch.zeros(3)),
    "momentum_shape": lambda p, t: other(t, "momentum.0", torch.zeros(2)),
    "momentum_kind": lambda p, t: other(t, "momentum.0", t["momentum.0"].half()),
    "momentum_gone": lambda p, t: t.pop("momentum.1"),
    "momentum_of_nothing": lambda p, t: other(t, "momentum.9999", torch.zeros(2)),
    "momentum_of_text": lambda p, t: other(t, "momentum.x", torch.zeros(2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_not_used_and_said_so(teacher, tmp_path, undisturbed, caplog, name):
    student, state, data, short = undisturbed
    (tmp_path / checkpoints.FILE).write_bytes(changed(data, CHANGES[name], name != "momentum_gone"))
    with caplog.at_level(logging.WARNING):
        found, again = distilled(teacher, short, checkpoint=tmp_path)
    assert same_weights(found, student) and again.epochs == state.epochs
    assert "is not used, the trial starts anew" in caplog.text and len(caplog.records[-1].getMessage()) < 500


def test_a_damaged_checkpoint_is_not_used_and_the_trial_starts_anew(teacher, tmp_path, undisturbed):
    student, state, data, short = undisturbed
    for damaged in (b"", data[:100], data[:-1], b"\0" * 50):
        (tmp_path / checkpoints.FILE).write_bytes(damaged)
        found, again = distilled(teacher, short, checkpoint=tmp_path)
        assert same_weights(found, student) and again.epochs == state.epochs


def test_damaged_checkpoints_are_used_or_not_and_nothing_else(tmp_path, undisturbed, teacher):
    _, _, data, short = undisturbed
    rng, header = random.Random(3), int.from_bytes(undisturbed[2][:8], "little")
    network = tiny_network().requires_grad_(True)
    optimiser = torch.optim.SGD(distillation.decay_groups(network, 0.0), lr=0.1, momentum=0.9)
    folder = distillation.storage.folder(tmp_path)
    for _ in range(100):
        damaged = bytearray(data)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice([1, 1, 3, 20])):
                damaged[rng.randrange(header if rng.random() < 0.9 else len(data))] = rng.randrange(256)
        (tmp_path / checkpoints.FILE).write_bytes(damaged)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        state = distillation_state.read(folder, network, optimiser, short.num_steps)
        after = network.state_dict()
        if state is None:
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        else:
            assert 0 <= state.step <= short.num_steps and all(tensor.isfinite().all() for tensor in after.values())


@pytest.fixture(scope="module")
def images():
    labels = torch.arange(40) % 2
    pixels = torch.randint(0, 256, (40, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return LabelledImages("made", lambda rows: pixels[rows], labels, ("dark", "bright"), (1, 16, 16))


TRAINING = {
    "other_epochs": lambda p, t: p.update(num_epochs=50),
    "true": lambda p, t: p.update(num_epochs=True),
    "less": lambda p, t: t.pop("network.fc.weight"),
    "nan": lambda p, t: t["network.fc.weight"].fill_(float("nan")),
    "momentum": lambda p, t: other(t, "momentum.0", torch.zeros(1)),
    "damaged": None,
}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The settings of a training, the network it gave, and its last checkpoint."""
    config, folder = TEACHER_TRAINING.model_copy(update={"num_epochs": 2}), tmp_path_factory.mktemp("trained")
    network = teachers.train(config, images, checkpoint=folder)[1]
    return config, network, (folder / "state.safetensors").read_bytes()


@pytest.mark.parametrize("kind", TRAINING)
def test_a_training_checkpoint_that_does_not_fit_is_not_used_and_said_so(images, trained, tmp_path, caplog, kind):
    (config, expected, whole), change = trained, TRAINING[kind]
    (tmp_path / "state.safetensors").write_bytes(changed(whole, change) if change else whole[:-7])
    with caplog.at_level(logging.WARNING):
        again = teachers.train(config, images, checkpoint=tmp_path)[1]
    assert "is not used, the training starts anew" in caplog.text and same_weights(again, expected)
