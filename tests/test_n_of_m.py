"""N:M patterns: what each keeps, the layers that cannot have one are named, and a trial keeps it."""

import pandas as pd
import pytest
import torch
from torch import nn

from dfkd_ray import bundles, trial
from dfkd_ray.compression import pruning
from dfkd_ray.config import PruningConfig, TrialConfig, columns_of, validate
from dfkd_ray.report import aggregates
from helpers import refusal, tiny_trial

LAYERS = {
    "convolution": nn.Conv2d(8, 6, 3),
    "grouped": nn.Conv2d(16, 8, 3, groups=2),
    "signals": nn.Conv1d(12, 5, 3),
    "transposed": nn.ConvTranspose2d(8, 6, 3),
    "grouped transposed": nn.ConvTranspose2d(16, 8, 3, groups=2),
    "linear": nn.Linear(24, 7),
}


def groups_of(network: nn.Module, masks: pruning.Masks, of: int) -> torch.Tensor:
    """The numbers kept of each `of` neighbours."""
    name, mask = next(iter(masks.items()))
    return pruning.neighbours(mask, name, network).unflatten(-1, (-1, of)).sum(-1)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_group_of_neighbours_keeps_as_many_as_the_pattern_says(kind, pattern):
    torch.manual_seed(0)
    network = nn.Sequential(LAYERS[kind])
    kept, of = map(int, pattern.split(":"))
    config = PruningConfig(structure="n_of_m", pattern=pattern, sparsity=1 - kept / of)
    if pruning.neighbours(LAYERS[kind].weight, "0.weight", network).shape[-1] % of:
        refusal(lambda: pruning.pattern_masks(network, config), f"pruning.pattern={pattern}")
        return
    masks, dense = pruning.pattern_masks(network, config)
    assert not dense and (groups_of(network, masks, of) == kept).all()


def test_the_largest_of_four_inputs_are_kept():
    network = nn.Sequential(nn.Linear(8, 1))
    network[0].weight.data = torch.tensor([[0.1, -4.0, 3.0, 0.2, 5.0, 5.0, 5.0, -6.0]])
    masks, _ = pruning.pattern_masks(network, PruningConfig(structure="n_of_m", sparsity=0.5))
    assert masks["0.weight"].tolist() == [[False, True, True, False, True, False, False, True]]  # ties by position


def test_neighbours_are_input_channels_at_one_place_of_the_kernel():
    network = nn.Sequential(nn.Conv2d(4, 1, (1, 2), bias=False))
    network[0].weight.data = torch.tensor([[1.0, 9.0], [2.0, 1.0], [3.0, 8.0], [4.0, 2.0]]).view(1, 4, 1, 2)
    masks, _ = pruning.pattern_masks(network, PruningConfig(structure="n_of_m", sparsity=0.5))
    assert masks["0.weight"].view(4, 2).int().tolist() == [[0, 1], [0, 0], [1, 1], [1, 0]]


def test_scores_decide_in_the_place_of_magnitudes():
    network = nn.Sequential(nn.Linear(4, 1))
    network[0].weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    scores = {"0.weight": torch.tensor([[0.0, 1.0, 2.0, 3.0]])}
    masks, _ = pruning.pattern_masks(network, PruningConfig(structure="n_of_m", sparsity=0.5), scores)
    assert masks["0.weight"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("criterion", ["lamp", "wanda"])
def test_a_trial_keeps_the_pattern_and_says_what_it_does_not_do(tiny_teacher, criterion):
    fields = {"pruning.structure": "n_of_m", "pruning.sparsity": 0.5, "pruning.criterion": criterion}
    config = validate(TrialConfig, tiny_trial(tiny_teacher, **fields))
    outcome = trial.run(config, bundles.load(tiny_teacher))
    row, student = outcome.row, outcome.student
    assert row["status"] == "finished" and student is not None
    weights = pruning.prunable(student)
    first, *others = weights
    assert (weights[first] != 0).all()  # one input channel
    assert all((groups_of(student, {name: weights[name] != 0}, 4) <= 2).all() for name in others)
    assert 0.49 < row["achieved_sparsity"] < 0.5
    assert "save time only" in row["warnings"] and first.removesuffix(".weight") in row["warnings"]


def test_a_pattern_has_one_sparsity_and_its_own_fields(tiny_teacher):
    def refused(**fields) -> str:
        return refusal(lambda: validate(TrialConfig, tiny_trial(tiny_teacher, **fields)))

    assert "set sparsity=0.5" in refused(**{"pruning.structure": "n_of_m", "pruning.sparsity": 0.75})
    assert "criterion=erk" in refused(
        **{"pruning.structure": "n_of_m", "pruning.sparsity": 0.5, "pruning.criterion": "erk"}
    )
    assert "pattern acts with structure=n_of_m" in refused(**{"pruning.pattern": "1:4"})
    assert "schedule acts with structure=unstructured" in refused(
        **{"pruning.structure": "n_of_m", "pruning.sparsity": 0.5, "pruning.schedule": "cubic"}
    )
    pattern = {"structure": "n_of_m", "sparsity": 0.5}
    config = validate(TrialConfig, {"teacher": "t", "pruning": pattern})
    assert "pruning.pattern" in columns_of(config)
    assert "pruning.pattern" not in columns_of(validate(TrialConfig, {"teacher": "t"}))


def test_tables_of_the_report_name_the_pattern():
    columns = {"teacher": "t", "teacher_hash": "h", "student.architecture": None, "student.arguments": "{}"}
    columns |= {"teacher_architecture": "resnet8"}
    patterns = [("unstructured", None), (None, None), ("n_of_m", "2:4"), ("channels", None)]
    rows = [columns | {"pruning.structure": structure, "pruning.pattern": pattern} for structure, pattern in patterns]
    assert aggregates.network_labels(pd.DataFrame(rows)).tolist() == [
        "resnet8", "resnet8", "resnet8, 2:4", "resnet8, channels"
    ]  # fmt: skip
