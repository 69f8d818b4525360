"""A budget of images through the teacher, in place of a number of distillation steps."""

from pathlib import Path
from typing import Any

import pytest

from dfkd_ray import bundles, trial
from dfkd_ray.config import EFFORTS, METHODS, TrialConfig, validate, with_effort, with_overrides
from dfkd_ray.trial.images import synthesis_passes
from helpers import TINY_TRIAL, jobs_of, tiny_sweep, tiny_trial

SMALL = {"num_channels": 4, "num_inputs": 4}
ROUNDS: dict[str, Any] = {"num_rounds": 3, "num_steps": 2, "num_threads": 1}
# Of each method that optimises images: the fields that make it small, two batches of eight images in a round.
FIELDS: dict[str, dict[str, Any]] = {
    "deepinversion": {"num_steps": 2, "num_threads": 1},
    "adi": {**ROUNDS, "adaptive_steps": 3},
    **{name: {**ROUNDS, **SMALL} for name in ("dfq", "dafl", "dfad", "zskt", "fast", "nayer")},
    "cmi": {**ROUNDS, **SMALL, "num_projected": 4, "bank_size": 20, "num_negatives": 6},
    "noise": {},
    "shapes": {},
}
TWO_BATCHES = {"bn_num_images": 48, "distillation.num_images": 48}


def budgeted(teacher: str | Path, method: str, num_passes: int, **fields: Any) -> TrialConfig:
    plain = with_overrides(tiny_trial(teacher), TWO_BATCHES | fields)
    plain["synthesis"] = {"method": method, "batch_size": 8, **FIELDS[method]}
    plain["distillation"] = {**plain["distillation"], "num_passes": num_passes, "mixup": 0.0}
    del plain["distillation"]["num_steps"]
    return validate(TrialConfig, plain)


def test_every_method_that_makes_images_from_the_teacher_is_tried():
    assert set(FIELDS) == {name for name, row in METHODS.items() if row.is_data_free} - {"records"}


@pytest.mark.parametrize("method", FIELDS)
def test_a_trial_takes_the_images_through_the_teacher_that_its_budget_allows(tiny_teacher, method):
    teacher, budget = bundles.load(str(tiny_teacher)), 48 * 2 * 3 + 47
    row = trial.run(budgeted(tiny_teacher, method, budget), teacher).row
    assert row["status"] == "finished", row["reason"]
    assert budget - TINY_TRIAL["distillation"]["batch_size"] < row["num_teacher_passes"] <= budget
    assert row["distillation.num_passes"] is None and row["distillation.num_steps"] > 2


def test_the_trial_of_a_budget_is_that_of_its_number_of_steps(tiny_teacher):
    teacher = bundles.load(str(tiny_teacher))
    config = trial.pinned(budgeted(tiny_teacher, "deepinversion", 48 * 2 + 5 * 8 + 7), teacher)
    assert config.distillation.num_steps == 5
    plain = config.model_dump(mode="json")
    assert trial.trial_id(validate(TrialConfig, plain), teacher) == trial.trial_id(config, teacher)
    assert trial.pinned(config, teacher) == config
    assert synthesis_passes(config) == 48 * 2


def test_trials_of_one_budget_in_a_sweep_have_the_steps_that_their_synthesis_leaves(tiny_teacher):
    data = tiny_sweep(
        tiny_teacher, {"synthesis.num_steps": [1, 3]}, **TWO_BATCHES, **{"distillation.num_passes": 48 * 4}
    )
    del data["base"]["distillation"]["num_steps"]
    assert [job.config.distillation.num_steps for job in jobs_of(data)] == [3 * 6, 1 * 6]


def test_a_budget_that_synthesis_uses_up_is_refused_with_the_least_that_does(tiny_teacher):
    teacher = bundles.load(str(tiny_teacher))
    refused = pytest.raises(ValueError, match=r"num_passes=103 leaves no step .* takes 96 images .* at least 104$")
    with refused:
        trial.pinned(budgeted(tiny_teacher, "deepinversion", 103), teacher)
    assert trial.pinned(budgeted(tiny_teacher, "deepinversion", 104), teacher).distillation.num_steps == 1


def test_a_budget_that_leaves_fewer_steps_than_rounds_is_refused(tiny_teacher):
    teacher = bundles.load(str(tiny_teacher))
    with pytest.raises(
        ValueError, match=r"num_rounds=3 needs a step of distillation each; distillation.num_steps is 2"
    ):
        trial.pinned(budgeted(tiny_teacher, "dfq", 48 * 2 + 2 * 8), teacher)


def test_two_numbers_of_steps_are_refused():
    fields = {"distillation": {"num_passes": 1000, "num_steps": 10}}
    with pytest.raises(ValueError, match=r"num_passes sets num_steps; leave num_steps out, or num_passes"):
        validate(TrialConfig, {"teacher": "t", **fields})


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_sets_no_number_of_steps_beside_a_budget(effort):
    given = {"teacher": "t", "distillation": {"num_passes": 10**6}}
    assert validate(TrialConfig, with_effort(given, effort)).distillation.num_passes == 10**6
