"""Sweep files: grids, exclusions, checks before anything starts, the schema for editors."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from dfkd_ray import bundles, sweep
from helpers import ABOUT

SWEEPS = sorted((Path(__file__).parent.parent / "sweeps").glob("*.yaml"))


def load(**parts) -> sweep.SweepConfig:
    return sweep.parse({"about": ABOUT, "base": {"teacher": "t"}, **parts})


def test_a_grid_is_the_product_of_its_axes_and_several_grids_their_union():
    settings = load(
        grid=[
            {"pruning.sparsity": [0.5, 0.9], "synthesis.bn_weight": [1.0, 3.0], "distillation.temperature": [2.0]},
            {"pruning.sparsity": [0.9], "synthesis": [{"method": "noise", "batch_size": 8}]},
        ]
    )
    trials = sweep.expand(settings, {})
    points = [(t.pruning.sparsity, t.synthesis.method, getattr(t.synthesis, "bn_weight", None)) for t in trials]
    product = [(s, "deepinversion", w) for s in (0.5, 0.9) for w in (1.0, 3.0)]
    assert points == [*product, (0.9, "noise", None)]


def test_seeds_multiply_trials_and_set_synthesis_and_distillation():
    trials = sweep.expand(load(grid={"pruning.sparsity": [0.5, 0.9]}, seeds=3), {})
    assert len(trials) == 6
    assert [(t.synthesis.seed, t.distillation.seed) for t in trials[:3]] == [(0, 0), (1, 1), (2, 2)]


def test_equal_points_are_one_trial():
    assert len(sweep.expand(load(grid={"pruning.sparsity": [0.5, 0.5]}), {})) == 1


def test_all_errors_of_all_combinations_come_at_once():
    settings = load(grid={"pruning.sparsity": [0.5, 1.5], "distillation.temprature": [1.0]})
    with pytest.raises(ValueError) as caught:
        sweep.expand(settings, {})
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines)) == 2
    assert any("1.5" in line for line in lines) and any("did you mean distillation.temperature" in x for x in lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"base": {"teacher": "t", "synthesis": {"seed": 42}}},
        {"grid": {"synthesis.seed": [7, 8, 9]}},
        {"grid": [{"pruning.sparsity": [0.5]}, {"distillation.seed": [5]}]},
        {"grid": {"synthesis": [{"method": "noise", "seed": 9}]}},
    ],
)
def test_seeds_never_replaces_a_seed_that_the_file_sets(changes):
    with pytest.raises(ValueError, match=r"seeds=2 runs every combination with seeds 0 to 1, and \w+.seed is set too"):
        load(**{"grid": {"pruning.sparsity": [0.5]}, "seeds": 2} | changes)
    assert load(**{"grid": {"pruning.sparsity": [0.5]}} | changes).seeds == 1


def test_tiny_fixes_axes_and_seeds_and_equal_points_are_one_trial():
    grid = {"pruning.sparsity": [0.5, 0.9], "distillation.temperature": [2.0, 4.0]}
    tiny = {"pruning.sparsity": 0.6, "synthesis.seed": 7, "distillation.seed": 7}
    settings = load(grid=grid, seeds=3, tiny=tiny)
    assert len(sweep.expand(settings, {})) == 12
    trials = sweep.expand(settings, {}, tiny=True)
    assert [(t.pruning.sparsity, t.synthesis.seed, t.distillation.temperature) for t in trials] == [
        (0.6, 7, 2.0),
        (0.6, 7, 4.0),
    ]


def test_overriding_a_field_of_the_grid_is_refused():
    with pytest.raises(ValueError, match="grid varies"):
        sweep.expand(load(grid={"pruning.sparsity": [0.5]}), {"pruning.sparsity": 0.9})
    with pytest.raises(ValueError, match=r"`set` synthesis.seed: the sweep's seeds vary|seeds varies"):
        sweep.expand(load(grid={"pruning.sparsity": [0.5]}, seeds=2), {"synthesis.seed": 3})


def test_overrides_reach_only_the_methods_that_have_the_field():
    settings = load(grid={"synthesis": [{"method": "noise"}, {"method": "deepinversion"}]})
    trials = sweep.expand(settings, {"synthesis.num_steps": 7, "synthesis.batch_size": 4})
    assert [t.synthesis.batch_size for t in trials] == [4, 4]
    assert trials[1].synthesis.model_dump()["num_steps"] == 7
    with pytest.raises(ValueError, match="unknown field"):
        sweep.expand(settings, {"synthesis.num_stepz": 7})


def test_all_teachers_that_cannot_be_opened_are_told_at_once():
    trials = sweep.expand(load(grid={"teacher": ["one", "two"]}), {})
    with pytest.raises(ValueError) as caught:
        sweep.plan(trials, bundles.load)
    assert len(str(caught.value).splitlines()) == 2


def sparsities(settings: sweep.SweepConfig, **options) -> list[float]:
    return [trial.pruning.sparsity for trial in sweep.expand(settings, {}, **options)]


def test_grid_or_search_and_exactly_one_of_them():
    search = {"space": {"pruning.sparsity": [0.5]}, "num_trials": 1}
    for parts in ({}, {"grid": {"pruning.sparsity": [0.5]}, "search": search}):
        with pytest.raises(ValueError, match="either grid or search"):
            load(**parts)


def test_exclude_leaves_out_what_matches_in_all_fields_and_nothing_else():
    grid = {"pruning.sparsity": [0.5, 0.75, 0.9], "distillation.temperature": [2.0, 4.0]}
    settings = load(grid=grid, exclude=[{"pruning.sparsity": [0.5, 0.9], "distillation.temperature": 2.0}])
    points = {(t.pruning.sparsity, t.distillation.temperature) for t in sweep.expand(settings, {})}
    assert points == {(0.5, 4.0), (0.75, 2.0), (0.75, 4.0), (0.9, 4.0)}


def test_exclude_knows_sections_defaults_and_combinations_that_would_be_refused():
    grid = {"synthesis": [{"method": "noise"}, {"batch_size": 8}], "distillation.label_weight": [0.0, 1.0]}
    with pytest.raises(ValueError, match="needs labels"):
        sweep.expand(load(grid=grid), {})
    wrong = {"synthesis.method": "noise", "distillation.label_weight": 1.0}
    assert len(sweep.expand(load(grid=grid, exclude=[wrong]), {})) == 3
    assert len(sweep.expand(load(grid=grid, exclude=[wrong, {"synthesis.bn_weight": "auto"}]), {})) == 1, "a default"


def test_an_exclusion_that_matches_nothing_is_an_error_that_names_it():
    grid = {"pruning.sparsity": [0.5, 0.9]}
    with pytest.raises(ValueError, match=r'"pruning.sparsity": 0.6.* matches no combination'):
        sweep.expand(load(grid=grid, exclude=[{"pruning.sparsity": 0.6}, {"pruning.sparsity": 0.9}]), {})
    with pytest.raises(ValueError, match=r"did you mean pruning\.sparsity"):
        load(grid=grid, exclude=[{"pruning.sparsty": 0.5}])
    with pytest.raises(ValueError, match="no combination to run"):
        sweep.expand(load(grid=grid, exclude=[{"pruning.sparsity": [0.5, 0.9]}]), {})


def test_tiny_runs_the_combinations_of_the_full_sweep():
    grid = {"pruning.sparsity": [0.5, 0.9]}
    exclude = [{"pruning.sparsity": 0.5, "distillation.num_steps": 300}]
    settings = load(grid=grid, exclude=exclude, tiny={"distillation.num_steps": 2})
    assert sparsities(settings) == sparsities(settings, tiny=True) == [0.9]


def test_configs_teachers_and_misfits_are_all_told_at_once(tiny_teacher):
    grid = {
        "teacher": [str(tiny_teacher), "missing"],
        "pruning.sparsity": [0.5, 1.5],
        "distillation.fast": [True],
        "device": ["cpu"],
    }
    with pytest.raises(ValueError) as caught:
        sweep.prepare(load(grid=grid), bundles.load)
    text = str(caught.value)
    assert "pruning.sparsity" in text and "1.5" in text and "missing" in text and "fast acts on CUDA only" in text
    assert len(text.splitlines()) == 3


def test_early_stopping_is_refused_where_it_could_not_compare_or_not_act():
    stop = {"asha": {"grace_looks": 1}}
    with pytest.raises(ValueError, match="teacher has to be the same"):
        sweep.expand(load(grid={"teacher": ["a", "b"]}, stop=stop), {})
    with pytest.raises(ValueError, match="reference has to be the same"):
        sweep.expand(load(grid={"reference.num_images": [16, 32]}, stop=stop), {})
    with pytest.raises(ValueError, match="step 300 of 300"):
        sweep.expand(load(grid={"pruning.sparsity": [0.5]}, stop={"asha": {"grace_looks": 3}}), {})
    assert sweep.expand(load(grid={"pruning.sparsity": [0.5]}, stop=stop), {})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_schema_accepts_every_shipped_sweep(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), sweep.json_schema())


GOOD = {"grid": {"pruning.sparsity": [0.5], "synthesis": [{"method": "noise"}]}, "exclude": [{"pruning.sparsity": 0.5}]}
SPACE = {"pruning.sparsity": {"uniform": [0.5, 0.9]}, "synthesis.bn_weight": {"choice": [0.1, 1.0]}}
SPACE |= {"distillation.num_steps": {"qrandint": [100, 300, 50]}, "distillation.temperature": [2.0, 4.0]}


def test_the_schema_is_valid_and_agrees_with_the_models_on_right_and_wrong_files(run_cli):
    schema = json.loads(run_cli("schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    search = {"search": {"space": SPACE, "algorithm": "optuna", "num_trials": 9}, "stop": {"asha": {}}}
    for right in (GOOD, search, {"grid": [GOOD["grid"]], "seeds": 3, "base": {"teacher": "t", "pruning": {}}}):
        assert sweep.parse(right) and check(right), right
    wrong = [
        {},
        {**GOOD, **search},
        {"grid": {"pruning.sparsty": [0.5]}},
        {"grid": {"pruning.sparsity": 0.5}},
        {"grid": {"pruning.sparsity": [1.5]}},
        {"search": {"space": {"teacher": ["a", "b"]}, "num_trials": 2}},
        {"search": {"space": {"pruning.sparsity": {"normal": [0, 1]}}, "num_trials": 2}},
        {"search": {"space": SPACE}},
        {**GOOD, "stop": {"asha": {"grace_looks": 0}}},
        {**GOOD, "base": {"prunning": {}}},
    ]
    for file in wrong:
        assert not check(file), file
        with pytest.raises(ValueError):
            sweep.expand(sweep.parse({"base": {"teacher": "t"}, **file}), {})
