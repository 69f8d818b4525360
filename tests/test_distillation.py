"""Distillation: masks hold, runs resume to the same numbers, selection is on the reference set."""

import uuid
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_ray import (
    batchnorm,
    bundles,
    checkpoints,
    devices,
    distillation,
    distillation_state,
    evaluation,
    features,
    losses,
    storage,
)
from dfkd_ray.compression import pruning
from dfkd_ray.config import PruningConfig
from dfkd_ray.heads import SOFTMAX
from helpers import SMALL_DISTILLATION, a_pool, distilled, same_weights


@pytest.fixture
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


@pytest.mark.parametrize("criterion", sorted(pruning.CRITERIA))
def test_masks_survive_every_optimiser_step(teacher, criterion):
    pruning_config = PruningConfig(sparsity=0.8, criterion=criterion)
    student = deepcopy(teacher.network).requires_grad_(True)
    masks = pruning.masks(student, pruning_config)
    seen = []

    def watch(stage, done, total, shown):
        weights = pruning.prunable(student)
        seen.append(all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items()))

    distilled(teacher, pruning_config=pruning_config, student=student, progress=watch)
    assert len(seen) == 6 and all(seen)
    assert pruning.achieved_sparsity(student) == pytest.approx(0.8, abs=1e-3)


def test_a_resumed_run_gives_the_same_numbers_as_an_undisturbed_one(teacher, tmp_path):
    undisturbed, expected = distilled(teacher)

    class Killed(Exception):
        pass

    def kill(stage, done, total, shown):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        distilled(teacher, checkpoint=tmp_path / "ckpt", progress=kill)
    assert (tmp_path / "ckpt" / checkpoints.FILE).is_file()
    resumed, state = distilled(teacher, checkpoint=tmp_path / "ckpt")
    assert same_weights(undisturbed, resumed)
    assert state.epochs == expected.epochs and state.best_step == expected.best_step


def test_seconds_are_of_all_attempts_and_not_of_waiting_for_images(teacher, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(distillation_state.time, "perf_counter", lambda: now)

    def work(stage, done, total, shown):
        nonlocal now
        now += 1.0
        if done == 5 and not resumes:
            raise KeyboardInterrupt

    def waits(step, student):
        nonlocal now
        now += 100.0
        return a_pool()

    resumes = False
    with pytest.raises(KeyboardInterrupt):
        distilled(teacher, checkpoint=tmp_path / "ckpt", progress=work, pool_at=waits)
    resumes = True
    _, state = distilled(teacher, checkpoint=tmp_path / "ckpt", progress=work, pool_at=waits)
    assert (state.earlier_s, state.seconds) == (4.0, 6.0), "one for each step"
    _, state = distilled(teacher, progress=work, pool_at=waits)
    assert (state.earlier_s, state.seconds) == (0.0, 6.0)


def test_a_checkpoint_is_read_without_pickle(teacher, tmp_path, monkeypatch):
    distilled(teacher, checkpoint=tmp_path / "ckpt")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    distilled(teacher, checkpoint=tmp_path / "ckpt")
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["state.safetensors"]


def test_a_checkpoint_under_a_uri_is_the_same_checkpoint(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation_state.time, "perf_counter", lambda: 0.0)  # its seconds are in it
    elsewhere = storage.folder(f"fsspec+memory://{uuid.uuid4().hex}/ckpt")
    for place in (tmp_path / "ckpt", elsewhere):
        distilled(teacher, checkpoint=place)
    data = (tmp_path / "ckpt" / checkpoints.FILE).read_bytes()
    assert elsewhere.read(checkpoints.FILE) == data
    student, state = distilled(teacher, checkpoint=elsewhere)
    expected, other = distilled(teacher)
    assert same_weights(student, expected) and state.epochs == other.epochs


def test_the_looks_are_handed_out_before_the_checkpoint_that_has_them(teacher, tmp_path, monkeypatch):
    events = []
    real = distillation_state.write

    def write(folder, student, optimiser, state):
        events.append(("checkpoint", state.step))
        real(folder, student, optimiser, state)

    monkeypatch.setattr(distillation_state, "write", write)
    _, state = distilled(
        teacher, checkpoint=tmp_path, on_epochs=lambda looks: events.append(("rows", looks[-1]["step"], len(looks)))
    )
    assert events[:4] == [("rows", 2, 2), ("checkpoint", 2), ("rows", 4, 3), ("checkpoint", 4)]
    assert [look["step"] for look in state.epochs] == [0, 2, 4, 6]


def test_a_look_says_what_was_minimised_at_which_rate_and_how_sparse_the_student_was(teacher):
    config = SMALL_DISTILLATION.model_copy(update={"label_weight": 0.5, "kl_weight": 2.0})
    student, state = distilled(teacher, config=config)
    first, *others = cast(list[dict[str, Any]], state.epochs)
    assert first["learning_rate"] is None and "loss" not in first
    for look in others:
        assert look["loss"] == pytest.approx(2.0 * look["kl"] + 0.5 * look["label"])
        assert look["learning_rate"] == distillation.learning_rate(config, look["step"] - 1)
        assert look["sparsity"] == pruning.achieved_sparsity(student)


def test_the_teacher_is_bit_identical_after_distillation(teacher):
    before = deepcopy(teacher.network.state_dict())
    distilled(teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.network.state_dict().items())


def test_the_selected_student_is_the_best_look_not_the_last(teacher, monkeypatch):
    scores = iter([(0.9, 2.0), (0.2, 0.5), (0.95, 1.0), (0.2, 0.5)])  # agreement, KL: the lowest KL selects
    monkeypatch.setattr(evaluation.Reference, "compare", lambda self, *a: next(scores))
    snapshots = {}
    student = deepcopy(teacher.network).requires_grad_(True)

    def watch(stage, done, total, shown):
        snapshots[done] = deepcopy(student)

    selected, state = distilled(teacher, student=student, progress=watch)
    assert (state.best_step, state.best_agreement, state.best_kl) == (2, 0.2, 0.5)
    assert same_weights(selected, snapshots[2]) and not same_weights(selected, snapshots[6])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_look_without_a_number_is_left_behind_by_the_first_with_one(teacher, monkeypatch, broken):
    distances = iter([broken, 2.0, broken, 1.0])
    monkeypatch.setattr(SOFTMAX, "kl", lambda *_arguments: torch.tensor(next(distances)), raising=True)
    images = np.zeros((2, 1, 16, 16), np.uint8)
    runtime = devices.Runtime(torch.device("cpu"), teacher.info.space, "float32", 1)
    reference = evaluation.reference(teacher.network, images, runtime)
    state = distillation_state.State()
    for step in range(4):
        state.step = step
        distillation.look(state, teacher.network, SMALL_DISTILLATION, reference, {})
    assert (state.best_step, state.best_kl) == (3, 1.0)


def test_patience_counts_looks_without_a_lower_kl_and_stops_early(teacher, monkeypatch):
    scores = iter([(0.1, 1.0)] + [(0.9, 1.0)] * 10)
    monkeypatch.setattr(evaluation.Reference, "compare", lambda self, *a: next(scores))
    _, state = distilled(teacher, config=SMALL_DISTILLATION.model_copy(update={"patience": 1}))
    assert state.step == 2 and state.best_step == 0


def running_means(network: nn.Module) -> list[torch.Tensor]:
    means = [layer.running_mean for layer in batchnorm.layers(network)]
    return [mean for mean in means if mean is not None]


@pytest.mark.parametrize(
    "mode, moves", [("frozen", False), ("reestimated", False), ("trained", True), ("paired", True)]
)
def test_batchnorm_statistics_move_only_when_trained(teacher, mode, moves):
    student = deepcopy(teacher.network).requires_grad_(True)
    before = [one.clone() for one in running_means(student)]
    config = SMALL_DISTILLATION.model_copy(update={"bn_mode": mode})
    state_student, state = distilled(teacher, config=config, student=student)
    if state.best_step == 0:
        pytest.fail("the run selected its start; the property is not exercised")
    after = running_means(state_student)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == moves


@pytest.mark.parametrize("every, end", [(1, 0.5), (2, 1.0), (4, 0.9)])
def test_cubic_schedule_ends_at_the_exact_sparsity_and_starts_dense(teacher, every, end):
    config = PruningConfig(sparsity=0.8, schedule="cubic", schedule_every=every, schedule_end=end)
    seen = []
    student = deepcopy(teacher.network).requires_grad_(True)
    distilled(
        teacher,
        pruning_config=config,
        student=student,
        progress=lambda *a: seen.append(pruning.achieved_sparsity(student)),
    )
    assert seen[0] < 0.1 and seen == sorted(seen)
    assert pruning.achieved_sparsity(student) == pytest.approx(0.8, abs=1e-3)


def test_cubic_schedule_never_selects_a_student_that_is_too_dense(teacher, monkeypatch):
    scores = iter([(1.0, 0.0), (1.0, 0.0), (0.3, 1.0), (0.2, 1.0)])
    monkeypatch.setattr(evaluation.Reference, "compare", lambda self, *a: next(scores))
    config = PruningConfig(sparsity=0.8, schedule="cubic", schedule_every=1)
    student, state = distilled(teacher, pruning_config=config)
    assert state.best_step >= 4
    assert pruning.achieved_sparsity(student) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"temperature": 1.0},
        {"label_weight": 1.0},
        {"feature_weight": 5.0},
        {"attention_weight": 50.0},
        {"kl_weight": 3.0},
        {"shift": 0},
        {"flip": False},
        {"mixup": 1.0},
        {"learning_rate": 0.2},
        {"momentum": 0.0},
        {"weight_decay": 0.5},
        {"warmup": 0.5},
        {"clip_norm": 1e-3},
        {"precision": "float32"},
        {"batch_size": 12},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_changes_the_student(teacher, change, monkeypatch):
    steps = iter(range(1000))
    # A KL that always falls selects the last student, whatever the option did.
    monkeypatch.setattr(evaluation.Reference, "compare", lambda self, *a: (1.0, 1 - next(steps) / 1000))
    base = SMALL_DISTILLATION.model_copy(update={"num_steps": 2})
    one, other = (distilled(teacher, config=settings)[0] for settings in (base, base.model_copy(update=change)))
    alike = "precision" in change and not devices.has_bfloat16(torch.device("cpu"))
    assert same_weights(one, other) == alike, "a CPU without bfloat16 runs both in float32"


def test_distillation_brings_a_new_student_towards_the_teacher(teacher):
    from dfkd_ray import models

    torch.manual_seed(3)
    student = models.build("resnet8", {"width_multiplier": 0.25}, num_classes=10, image_shape=(1, 16, 16))
    config = SMALL_DISTILLATION.model_copy(update={"num_steps": 40, "eval_every": 20})
    _, state = distilled(teacher, config=config, pruning_config=PruningConfig(sparsity=0), student=student)
    looks = cast(list[dict[str, float]], state.epochs)
    assert looks[-1]["kl"] < 0.7 * looks[1]["kl"] or state.best_kl < 0.7 * looks[0]["reference_kl"]


def test_feature_term_of_unequal_widths_is_refused(teacher):
    from dfkd_ray import models

    student = models.build("resnet8", {"width_multiplier": 0.25}, num_classes=10, image_shape=(1, 16, 16))
    with pytest.raises(ValueError, match="feature_weight"):
        distilled(
            teacher,
            config=SMALL_DISTILLATION.model_copy(update={"feature_weight": 1.0}),
            pruning_config=PruningConfig(sparsity=0),
            student=student,
        )


def test_attention_maps_are_compared_at_the_sizes_that_both_networks_have():
    maps = {(4, 4): torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), (2, 2): torch.ones(2, 5, 2, 2)}
    other = {(4, 4): maps[4, 4].flip(3), (8, 8): torch.ones(2, 3, 8, 8)}
    found = distillation.attention_loss(other, maps)
    torch.testing.assert_close(found, losses.attention_distance(other[4, 4], maps[4, 4]))
    assert float(distillation.attention_loss(maps, maps)) == 0.0
    with pytest.raises(ValueError, match="the student's are 8x8, the teacher's 2x2; set it to 0"):
        distillation.attention_loss({(8, 8): other[8, 8]}, {(2, 2): maps[2, 2]})


def test_maps_are_the_last_of_each_size_and_hooks_do_not_stay():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 1), nn.Flatten())
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with features.last_maps(network) as maps:
        network(images)
        expected = {(4, 4): network[:2](images), (2, 2): network[:4](images)}
    assert maps.keys() == expected.keys()
    for size, found in expected.items():
        torch.testing.assert_close(maps[size], found)
    with distillation.maps(network, False) as maps:
        network(images)
    assert not maps and not any(module._forward_hooks for module in network.modules())


def test_a_loss_that_is_not_finite_is_an_error_that_says_so(teacher):
    with pytest.raises(FloatingPointError, match="not finite by step"):
        distilled(teacher, config=SMALL_DISTILLATION.model_copy(update={"kl_weight": 1e38, "precision": "float32"}))


def test_every_image_is_seen_once_per_epoch():
    rows = torch.cat([distillation.rows_of(SMALL_DISTILLATION, 24, step) for step in range(3)])
    assert sorted(rows.tolist()) == list(range(24))
    assert not torch.equal(
        distillation.rows_of(SMALL_DISTILLATION, 24, 0), distillation.rows_of(SMALL_DISTILLATION, 24, 3)
    )
