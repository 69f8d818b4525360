"""Which weights stay: the choice by least squares against every choice there is; its counts, patterns and limits."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from dfkd_ray import config
from dfkd_ray.compression import layerwise, least_squares, pruning, selection
from dfkd_ray.compression.moments import Moments
from dfkd_ray.compression.selection import Selection
from dfkd_ray.config import PruningConfig, TrialConfig, validate
from helpers import tiny_network, tiny_trial

RIDGE = 0.01


def problem(outputs: int, inputs: int, seed: int, groups: int = 1) -> tuple[Moments, Tensor]:
    """Moments of inputs that depend on each other, with the target of teacher's rows; and these rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 200, inputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    x = x @ (mixing + torch.eye(inputs)) + torch.rand(inputs, generator=generator)
    dense = torch.randn(groups, outputs, inputs, generator=generator, dtype=torch.float64)
    gram = x.mT @ x / x.shape[1]
    return Moments(torch.zeros(groups, inputs), gram, dense @ gram, torch.zeros(groups, outputs)), dense


def chosen_of(moments: Moments, dense: Tensor, kept: Tensor, num_positions: int = 1, of: int | None = None) -> Tensor:
    """The positions that are chosen; they must be, and the rows must be those fitted there."""
    found = Selection(of).choose(moments, dense, kept, RIDGE, num_positions)
    assert found is not None
    torch.testing.assert_close(found[1], least_squares.solve(moments, dense, found[0], RIDGE))
    return found[0]


def explained(moments: Moments, dense: Tensor, kept: Tensor) -> Tensor:
    """By how much the fitted weights of each row (groups, outputs) lower the error of a row of zeros."""
    wanted = least_squares.ridged(moments, dense, RIDGE)[1]
    return (least_squares.solve(moments, dense, kept, RIDGE) * wanted).sum(2)


def by_magnitude(dense: Tensor, num_kept: int) -> Tensor:
    """The mask of the largest weights of each row."""
    return torch.zeros_like(dense, dtype=torch.bool).scatter_(2, dense.abs().topk(num_kept).indices, True)


def error(moments: Moments, dense: Tensor, kept: Tensor) -> float:
    """Mean squared error of the fitted rows of a mask."""
    lost = least_squares.solve(moments, dense, kept, RIDGE) - dense
    return float(torch.einsum("goi,gij,goj->", lost, moments.gram, lost))


def test_the_choice_is_near_the_best_of_all_choices_and_far_better_than_by_magnitude():
    by_size = chosen = best = 0.0
    for seed in range(12):
        moments, dense = problem(1, 9, seed)
        kept = by_magnitude(dense, 3)
        by_size += error(moments, dense, kept)
        chosen += error(moments, dense, chosen_of(moments, dense, kept))
        every = (
            torch.zeros(1, 1, 9).index_fill_(2, torch.tensor(three), 1).bool() for three in combinations(range(9), 3)
        )
        best += min(error(moments, dense, mask) for mask in every)
    assert best <= chosen < 1.25 * best
    assert by_size > 1.9 * chosen


def test_no_row_is_worse_than_with_the_mask_it_came_with():
    moments, dense = problem(40, 9, seed=7)
    kept = by_magnitude(dense, 3)
    found = chosen_of(moments, dense, kept)
    gained = explained(moments, dense, found) - explained(moments, dense, kept)
    assert (gained >= 0).all() and (gained > 0).any()
    assert torch.equal(gained == 0, (found == kept).all(2))


def test_each_row_keeps_as_many_weights_as_before():
    moments, dense = problem(6, 20, seed=1, groups=2)
    kept = torch.rand(2, 6, 20, generator=torch.Generator().manual_seed(0)) < torch.arange(6).view(1, 6, 1) / 5
    assert kept[:, 5].all() and not kept[:, 0].any()
    chosen = chosen_of(moments, dense, kept)
    assert torch.equal(chosen.sum(2), kept.sum(2)) and not torch.equal(chosen, kept)
    assert torch.equal(chosen, chosen_of(moments, dense, kept))


@pytest.mark.parametrize("num_positions", [1, 9])
def test_of_each_block_of_neighbours_as_many_stay_as_the_pattern_says(num_positions):
    moments, dense = problem(5, 8 * num_positions, seed=2)
    scores = dense.reshape(5, 2, 4, num_positions).abs()
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2, dim=2).indices, True)
    kept = kept.reshape(1, 5, -1)
    chosen = chosen_of(moments, dense, kept, num_positions, 4)
    assert (chosen.reshape(5, 2, 4, num_positions).sum(2) == 2).all()
    assert error(moments, dense, chosen) < 0.9 * error(moments, dense, kept)


def test_layers_that_are_dense_empty_unseen_too_large_or_not_finite_are_left_as_they_are(monkeypatch):
    moments, dense = problem(4, 6, seed=3)
    for kept in (torch.ones(1, 4, 6).bool(), torch.zeros(1, 4, 6).bool()):
        assert torch.equal(chosen_of(moments, dense, kept), kept)
    kept = by_magnitude(dense, 2)
    nothing = Moments(moments.mean, torch.zeros(1, 6, 6).double(), torch.zeros(1, 4, 6).double(), moments.target_mean)
    assert torch.equal(chosen_of(nothing, dense, kept), kept)
    infinite = Moments(moments.mean, moments.gram * float("nan"), moments.cross, moments.target_mean)
    left = Selection().choose(infinite, dense, kept, RIDGE, 1)
    assert left is None or torch.equal(left[0], kept)
    monkeypatch.setattr(selection, "MOST_OPERATIONS", 1.0)
    assert Selection().choose(moments, dense, kept, RIDGE, 1) is None


def images(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).cumsum(3) / 4


def reconstructed(chooses: Selection | None, masks: pruning.Masks) -> tuple[nn.Module, layerwise.Done]:
    teacher, student = tiny_network().eval(), tiny_network().eval()
    pruning.apply(student, masks)
    given = images(64)
    return student, layerwise.reconstruct(student, teacher, lambda n: given[:n], 64, masks, selection=chooses)


@torch.no_grad()
def test_a_network_is_nearer_to_its_teacher_with_the_same_number_of_weights_in_each_row():
    teacher = tiny_network().eval()
    masks = pruning.masks(teacher, PruningConfig(sparsity=0.8))
    before, _done = reconstructed(None, masks)
    after, done = reconstructed(Selection(), masks)
    new = images(64, seed=1)
    errors = [float((student(new) - teacher(new)).square().mean()) for student in (before, after)]
    assert errors[1] < 0.8 * errors[0]
    assert done.masks.keys() == masks.keys() and any(not torch.equal(done.masks[name], masks[name]) for name in masks)
    for name, weight in pruning.prunable(after).items():
        assert torch.equal(weight != 0, done.masks[name])
        assert torch.equal(done.masks[name].flatten(1).sum(1), masks[name].flatten(1).sum(1))


def test_layers_whose_weights_could_not_be_chosen_are_named(monkeypatch):
    masks = pruning.masks(tiny_network(), PruningConfig(sparsity=0.8))
    monkeypatch.setattr(selection, "MOST_OPERATIONS", 1.0)
    student, done = reconstructed(Selection(), masks)
    assert set(done.not_chosen) == {name for name, mask in masks.items() if not mask.all()}
    same, _done = reconstructed(None, masks)
    assert all(torch.equal(mine, other) for mine, other in zip(student.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"pruning.structure": "channels"},
        {"pruning.schedule": "cubic"},
        {"reconstruction.num_images": 0},
        {"distillation.bn_mode": "frozen"},
        {"pruning.sparsity": 0.0},
        {"student.architecture": "resnet8"},
    ],
)
def test_where_it_cannot_act_it_is_no_part_of_a_trials_id(fields):
    one, other = (
        validate(TrialConfig, tiny_trial("t", **fields, **{"reconstruction.reselect": value}), "a test")
        for value in (True, False)
    )
    assert not one.reselects and config.hashed(one) == config.hashed(other)
    both = [validate(TrialConfig, tiny_trial("t", **{"reconstruction.reselect": value}), "") for value in (True, False)]
    assert both[0].reselects and not both[1].reselects
    assert config.hashed(both[0]) != config.hashed(both[1])
