"""Sweep files of any content: one validation, counts before trials, few lines for many errors."""

import random
import time
from contextlib import suppress

import pytest

from dfkd_ray import bundles, config, sweep

GRID = {"pruning.sparsity": [0.5]}
SET = {"synthesis.num_steps": 3}


def refused(data, overrides=None, **options) -> list[str]:
    """The lines that a sweep file is refused with."""
    with pytest.raises(ValueError) as caught:
        sweep.expand(sweep.parse(data, "f.yaml"), overrides or {}, **options)
    lines = str(caught.value).splitlines()
    assert 0 < len(lines) <= 25 and all(line.strip() and len(line) < 500 for line in lines), lines[:30]
    return lines


def of(**parts) -> dict:
    return {"base": {"teacher": "t"}, **parts}


# ---- one validation ------------------------------------------------------------------------------------------------

WRONG = [3, True, "noise", ["noise"], {"method": ["x"]}, {"method": None}, {"method": "magic"}, {"method": {"a": 1}}]


@pytest.mark.parametrize("section", ["synthesis", "reference.synthesis"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_a_wrong_section_is_told_the_same_whatever_else_is_set(section, value):
    data = {"base": config.with_overrides({"teacher": "t"}, {section: value}), "grid": GRID}
    alone = refused(data)
    assert len(alone) == 1 and section in alone[0]
    field = {f"{section}.num_steps": 3}
    assert refused(data, field) == refused({**data, "tiny": field}, tiny=True) == alone
    excluded = {**data, "exclude": [{"pruning.sparsity": 0.1, f"{section}.num_steps": 60}]}
    assert refused(excluded, field)[0] == alone[0]


def test_no_plain_data_anywhere_in_a_sweep_file_raises_anything_but_a_refusal():
    loop: list = []
    loop.append(loop)
    deep: dict = {}
    for _ in range(500):
        deep = {"a": deep}
    values = [True, None, 0, 1, -1, 3, 2**63, 10**400, 10**5000, float("nan"), 1e39, "x", "", "3", "\ud800", "a\0b"]
    values += ["x" * 5000, [], {}, [1], [[]], {1: 2}, {None: 1}, {(1, 2): 3}, (1, 2), b"a", object, deep, loop, *WRONG]
    values += [{"uniform": [0, 1]}, {"randint": [0, 2**70]}, {"quniform": [0, 1, 1e-320]}, {"choice": [[1], [1]]}]
    fields: list = [
        *dict.fromkeys(config.field_paths(config.TrialConfig)),
        "student.arguments.a",
        "a..b",
        "",
        "teacher.x",
    ]
    fields += [3, None, "synthesis.method.x", "base", "x" * 5000, ".".join("a" * 600)]
    rng = random.Random(13)

    def some(most: int) -> dict:
        return {rng.choice(fields): rng.choice(values) for _ in range(rng.randint(0, most))}

    def base():
        data = {"teacher": "t", **{name: value for name, value in some(1).items() if "." not in str(name)}}
        for name, value in some(2).items():
            if isinstance(name, str) and name.count(".") < 9:
                with suppress(ValueError):  # a part of what is plain
                    data = config.with_overrides(data, {name: value})
        return data if rng.random() < 0.9 else rng.choice(values)

    num_refused = 0
    for _ in range(1500):
        file = {"base": base(), "grid": {rng.choice(fields): [rng.choice(values)] * rng.randint(0, 2)}}
        if rng.random() < 0.4:
            space = {"pruning.sparsity": {"uniform": [0.1, 0.5]}, **some(2)}
            algorithm = rng.choice(["random", "optuna"])
            file["search"] = {"space": space, "num_trials": rng.choice([2, True, 10**9]), "algorithm": algorithm}
            file.pop("grid")
        file |= {key: [some(2)] if key == "exclude" else some(2) for key in ("exclude", "tiny") if rng.random() < 0.3}
        file |= {key: rng.choice(values) for key in ("stop", "about", "seeds", "grid", "search") if rng.random() < 0.1}
        overrides = rng.choice([{}, SET, {k: v for k, v in some(2).items() if isinstance(k, str)}])
        for tiny in (False, True):
            try:
                sweep.expand(sweep.parse(file, "f.yaml"), overrides, tiny=tiny)
            except ValueError as error:
                lines = str(error).splitlines()
                assert 0 < len(lines) <= 25 and max(map(len, lines)) < 700
                num_refused += 1
    assert num_refused > 1000


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"grid": GRID, "seeds": 10**6}, "seeds"),
        ({"grid": GRID, "seeds": 10**400}, "seeds"),
        ({"grid": GRID, "seeds": True}, "seeds"),
        ({"grid": {"pruning.sparsity": [0.5, 0.6]}, "seeds": 60_000}, "120,000 trials"),
        (
            {"grid": {"pruning.sparsity": [0.5] * 1000, "bn_num_images": [8] * 1000}},
            "1,000 of pruning.sparsity x 1,000",
        ),
        ({"grid": [GRID, {"pruning.sparsity": [0.5] * 50_000}], "seeds": 2}, "100,002 trials"),
        ({"grid": {f"student.arguments.a{i}": [1, 2] for i in range(2000)}}, "more than 10^602 trials"),
        ({"search": {"space": GRID, "num_trials": 10**9}}, "num_trials"),
        ({"search": {"space": GRID, "num_trials": True}}, "num_trials"),
        ({"search": {"space": GRID, "num_trials": 100_000}}, "no more than 1 distinct points"),
        ({"search": {"space": {"bn_num_images": {"randint": [8, 16]}}, "num_trials": 100_000}}, "no more than 8"),
    ],
    ids=range(11),
)
def test_more_trials_than_a_sweep_may_have_are_counted_not_made(parts, says):
    start = time.process_time()
    (line,) = refused(of(**parts))
    assert says in line and time.process_time() - start < 250  # a hang


def test_a_new_student_is_looked_at_once_however_many_seeds_and_fractions_there_are(tiny_teacher, monkeypatch):
    from dfkd_ray import trial

    seen = []
    build = trial.starting_student
    monkeypatch.setattr(trial, "starting_student", lambda config, *rest: seen.append(config) or build(config, *rest))
    student = {"architecture": "resnet8", "arguments": {"width_multiplier": 0.25}}
    grid = {"pruning.sparsity": [0.1, 0.2, 0.3], "student.arguments.width_multiplier": [0.25, 0.5]}
    settings = sweep.parse({"base": {"teacher": str(tiny_teacher), "student": student}, "grid": grid, "seeds": 3})
    assert len(sweep.prepare(settings, bundles.load).jobs) == 18 and len(seen) == 2


# ---- errors of many trials -----------------------------------------------------------------------------------------


def test_each_fields_error_is_told_once_with_how_many_trials_it_concerns():
    grid = {"pruning.sparsity": [0.5, 0.6, 1.5, 2.5], "distillation.temperature": [1.0, -1.0], "bn_num_images": [8, 16]}
    lines = sorted(refused(of(grid=grid)), reverse=True)
    assert len(lines) == 2
    assert "(given: 1.5) and 1 value more (in 8 of 16 trials)" in lines[0] and "pruning.sparsity" in lines[0]
    assert "(given: -1.0) (in 8 of 16 trials)" in lines[1] and "distillation.temperature" in lines[1]


def test_an_error_of_many_trials_is_put_into_words_once(monkeypatch):
    from dfkd_ray.sweep import combinations

    described = []
    monkeypatch.setattr(combinations, "describe", lambda *error: described.append(error) or str(len(described)))
    grid = {"pruning.sparsity": [1.5 + i for i in range(50)], "distillation.temprature": [-1.0 - i for i in range(50)]}
    assert len(refused(of(grid=grid))) == len(described) == 2


def test_errors_without_end_end_the_look_at_further_trials(monkeypatch):
    from dfkd_ray.sweep import combinations

    monkeypatch.setattr(combinations, "MOST_FAULTS", 50)
    base = {"teacher": "t", **{f"x{i}": 1 for i in range(10)}}
    lines = refused({"base": base, "grid": {"pruning.sparsity": [i / 1000 for i in range(500)]}})
    assert len(lines) == 11 and lines[-1] == "sweep: 494 trials were not looked at any more"


def test_many_teachers_that_are_not_there_are_few_lines():
    grid = {"teacher": [f"none-{i}" for i in range(200)]}
    with pytest.raises(ValueError) as caught:
        sweep.prepare(sweep.parse({"grid": grid}), bundles.load)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "and 180 errors more"


# ---- what cannot act -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"grid": GRID, "tiny": {"distillation.temprature": 3}}, "did you mean distillation.temperature"),
        ({"grid": GRID, "tiny": {"distillation.num_steps": "many"}}, "distillation.num_steps"),
        ({"grid": GRID, "tiny": {"distillation.num_steps": True}}, "distillation.num_steps"),
        ({"grid": GRID, "tiny": {"synthesis": {"method": "magic"}}}, "magic"),
        ({"grid": GRID, "tiny": [1]}, "tiny"),
        ({"grid": {}}, "grid: expected fields"),
        ({"grid": []}, "grid: expected fields"),
        ({"grid": [GRID, {}]}, "grid: expected fields"),
        ({"grid": 3}, "grid: expected fields"),
        ({"grid": {"pruning.sparsity": []}}, "a list without values"),
        ({"grid": {"pruning.sparsity": 0.5}}, "expected a list of values"),
        ({"grid": {"pruning..sparsity": [0.5]}}, "is empty"),
        ({"grid": {"synthesis.num_steps": [1], "synthesis": [{}]}}, "would be replaced by synthesis"),
        ({"grid": GRID, "exclude": [{}]}, "without fields"),
        ({"search": {"space": {}, "num_trials": 1}}, "space"),
        ({"search": {"space": {"pruning.sparsity": {"uniform": [0, 10**400]}}, "num_trials": 1}}, "64 bits"),
        ({"search": {"space": {"pruning.sparsity": {"uniform": [0, 1e300]}}, "num_trials": 1}}, "at most"),
        ({"search": {"space": {"pruning.sparsity": {"quniform": [0, 1, 1e-300]}}, "num_trials": 1}}, "too small"),
    ],
    ids=range(18),
)
def test_what_could_not_act_is_refused_as_the_file_is_read(parts, says):
    with pytest.raises(ValueError) as caught:
        sweep.parse(of(**parts), "f.yaml")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_set_field_that_no_trial_has_is_refused_and_the_chosen_method_counts():
    assert "leave it out" in refused(of(grid=GRID), {"synthesis.record": "top"})[0]
    (config,) = sweep.expand(sweep.parse(of(grid=GRID)), {"synthesis.record": "top", "synthesis.method": "records"})
    assert config.synthesis.method == "records" and config.synthesis.record == "top"


@pytest.mark.parametrize(
    ("grid", "overrides"),
    [
        ({"synthesis": [{"method": "noise"}, {"num_steps": 3}]}, {"synthesis.num_steps": 9}),
        ({"synthesis.num_steps": [1, 2]}, {"synthesis": {"method": "noise"}}),
        ({"reference.synthesis.num_steps": [1, 2]}, {"reference": {"num_images": 8}}),
    ],
)
def test_a_set_field_that_would_undo_a_part_of_the_grid_is_refused(grid, overrides):
    assert "the sweep's grid varies this field" in refused(of(grid=grid), overrides)[0]


def test_true_excludes_no_number_that_is_one():
    settings = sweep.parse(of(grid={"distillation.num_steps": [1, 2]}, exclude=[{"distillation.num_steps": True}]))
    with pytest.raises(ValueError, match="matches no combination"):
        sweep.expand(settings, {})
