"""Ranges in `about.expected` of a sweep file: validated with it, and compared with the rows of its own trials."""

import re

import jsonschema
import pytest

from dfkd_ray import bundles, results, sweep, synthesis, trial
from dfkd_ray.config import DeepInversionConfig
from dfkd_ray.sweep import checking, runner
from helpers import ABOUT, tiny_sweep, tiny_trial, write_yaml
from table_rows import columns

GRID = {"pruning.sparsity": [0.5, 0.9]}
LOW, HIGH = {"pruning.sparsity": 0.5}, {"pruning.sparsity": 0.9}
LOST = {LOW["pruning.sparsity"]: (1.0, 2.0), HIGH["pruning.sparsity"]: (5.0, 8.0)}  # by seed
TINY = {"distillation.num_steps": 1}
WEIGHTS = {"synthesis.bn_weight": 0.2, "reference.synthesis.bn_weight": 0.2}  # no teacher is asked for them
MEASURED = {"teacher_accuracy": 0.9, "teacher_hash": "a" * 64, "test_sha256": "b" * 64, "trial_version": 3}


def data_of(*ranges, **more):
    """A sweep file's plain data, with ranges."""
    about = ABOUT | {"expected": list(ranges)}
    return tiny_sweep("net", GRID, **WEIGHTS) | {"seeds": 2, "about": about, "tiny": TINY} | more


def rows_of(data, *, tiny=False, **more):
    """Finished rows of all trials of a sweep."""
    rows = []
    for number, config in enumerate(sweep.expand(sweep.parse(data), {}, tiny=tiny)):
        lost = LOST[config.pruning.sparsity][config.synthesis.seed]
        own = {"trial_id": f"t-{number:012x}", "status": "finished", "recovered_accuracy": 0.9 - lost / 100}
        own |= {"reference_kl": 0.1 * (number + 1), "synthesis_version": 2}
        rows.append(columns(config.model_dump(mode="json")) | MEASURED | own | more)
    return rows


@pytest.fixture
def checked(tmp_path, run_cli):
    """Check a place with a sweep file's data and rows; returns exit code, lines, error."""

    def run(data, rows, *words):
        place = tmp_path / "place"
        results.write(place, "trials", rows, "all")
        (place / "sweep.yaml").write_bytes(runner.as_yaml(sweep.parse(data)))
        done = run_cli("results", str(place), "--check", *words)
        return done.code, done.out.splitlines(), done.err

    return run


def test_a_line_for_each_range_says_trials_mean_and_bounds(checked):
    ranges = (
        {"where": LOW, "metric": "points_lost", "at_least": 1.5, "at_most": 1.6, "text": "as published"},
        {"where": HIGH, "metric": "points_lost", "at_most": 6.6},
    )
    code, lines, err = checked(data := data_of(*ranges), rows_of(data))
    assert (code, err) == (0, "")
    assert lines == [
        "ok       pruning.sparsity=0.5: points_lost 1.50 ± 0.71 (2 of 2 trials), expected 1.5 to 1.6 (as published)",
        "ok       pruning.sparsity=0.9: points_lost 6.50 ± 2.12 (2 of 2 trials), expected at most 6.6",
        "2 of 2 ranges met",
    ]


@pytest.mark.parametrize("bounds", [{"at_most": 6.4}, {"at_least": 6.6}, {"at_least": 7.0, "at_most": 8.0}])
def test_a_range_that_is_not_met_is_named_and_the_exit_code_is_1(checked, bounds):
    ranges = (
        {"where": LOW, "metric": "points_lost", "at_most": 2.0},
        {"where": HIGH, "metric": "points_lost"} | bounds,
    )
    code, lines, _ = checked(data := data_of(*ranges), rows_of(data))
    assert code == 1 and lines[0].startswith("ok ") and lines[-1] == "1 of 2 ranges met"
    assert lines[1].startswith("off      pruning.sparsity=0.9: points_lost 6.50 ± 2.12 (2 of 2 trials), expected ")


def test_the_best_is_the_lowest_reference_kl_never_the_best_accuracy(checked):
    data = data_of({"of": "best", "metric": "points_lost", "at_least": 7.9})
    rows = rows_of(data)
    rows[-1]["reference_kl"] = 0.01
    rows[0]["reference_kl"] = None
    code, lines, _ = checked(data, rows)
    assert code == 0 and "all trials: points_lost 8.00 (the lowest reference_kl of 3 of 4 trials)" in lines[0]


def test_trials_that_have_not_finished_are_said_and_no_rows_are_no_success(checked):
    ranges = (
        {"where": HIGH, "metric": "points_lost", "at_most": 9.0},
        {"where": LOW, "metric": "points_lost", "at_most": 9},
    )
    rows = rows_of(data := data_of(*ranges))
    rows[0]["status"], rows[1]["status"], rows[2]["status"] = "failed", "stopped", "failed"
    code, lines, _ = checked(data, rows)
    assert code == 1 and lines[0] == "1 of the sweep's 4 trials have finished"
    assert lines[1].startswith("ok ") and "points_lost 8.00 (1 of 2 trials, 1 failed or stopped)" in lines[1]
    assert lines[2].startswith("no rows  ") and "nothing measured (0 of 2 trials, 2 failed or stopped)" in lines[2]


def test_rows_without_the_metric_are_no_success(checked):
    data = data_of({"where": LOW, "metric": "points_lost", "at_most": 9.0})
    code, lines, _ = checked(data, rows_of(data, recovered_accuracy=None))
    assert code == 1 and lines[0].startswith("no rows  pruning.sparsity=0.5: points_lost nothing measured (0 of 2")


def test_only_rows_of_the_files_own_trials_and_newest_version_count(checked):
    data = data_of({"where": LOW, "metric": "points_lost", "at_most": 1.6})
    rows = rows_of(data)
    other = rows[0] | {"trial_id": "t-other", "distillation.temperature": 9.0, "recovered_accuracy": 0.1}
    older = rows[0] | {"trial_id": "t-older", "trial_version": 2, "recovered_accuracy": 0.1}
    code, lines, _ = checked(data, [*rows, other, older])
    assert code == 0 and lines[:2] == [
        "left out: 1 rows of trials that are none of the sweep",
        "left out: 1 rows of older versions",
    ]


def test_rows_of_another_batchnorm_weight_than_the_teachers_own_are_none_of_the_sweep(checked, tiny_teacher):
    data = data_of({"where": LOW, "metric": "points_lost", "at_most": 1.6})
    teacher, own = bundles.load(str(tiny_teacher)), rows_of(data)
    weight = synthesis.pinned(teacher, DeepInversionConfig()).bn_weight
    rows = [row | {"teacher": str(tiny_teacher)} | dict.fromkeys(WEIGHTS, weight) for row in own]
    others = [row | {"trial_id": f"t-f{row['trial_id'][3:]}", "synthesis.bn_weight": 3 * weight} for row in rows]
    data["base"] = tiny_trial(tiny_teacher)
    code, lines, err = checked(data, [*rows, *others])
    assert (code, err) == (0, "") and lines[0] == f"left out: {len(others)} rows of trials that are none of the sweep"
    assert "(2 of 2 trials)" in lines[1]
    data["tiny"] = TINY | {"teacher": "fashion_mnist_resnet8"}
    weight = synthesis.pinned(bundles.load("fashion_mnist_resnet8"), DeepInversionConfig()).bn_weight
    of_tiny = [row | dict.fromkeys(WEIGHTS, weight) for row in rows_of(data, tiny=True)]
    assert "tiny size" in checked(data, of_tiny)[2], "its teacher is asked too"
    data["tiny"], data["base"]["teacher"] = TINY, "gone"
    _, lines, err = checked(data, [row | {"teacher": "gone"} for row in [*rows, *others]])
    assert err == "teacher gone cannot be opened here: its rows count whatever they have where a field is auto\n"
    assert not lines[0].startswith("left out")


def test_rows_of_another_learning_rate_than_auto_stands_for_are_none_of_the_sweep(checked, tiny_teacher):
    data = data_of({"where": LOW | {"distillation.bn_mode": "auto"}, "metric": "points_lost", "at_most": 1.6})
    data["base"] = tiny_trial(tiny_teacher, **WEIGHTS, **{"pruning.structure": "channels"})
    rows = [
        row | {"distillation.bn_mode": "paired", "distillation.learning_rate": rate, "trial_id": f"t-{rate}-{number}"}
        for number, row in enumerate(rows_of(data))
        for rate in (0.05, 0.01)
    ]
    code, lines, err = checked(data, rows)
    assert (code, err) == (0, "") and lines[0] == "left out: 4 rows of trials that are none of the sweep"
    assert "(2 of 2 trials)" in lines[1]


def test_a_trial_that_says_a_value_is_not_taken_for_its_neighbour_that_leaves_it_to_a_teacher_now_gone(checked):
    low = [{"where": LOW | {"distillation.learning_rate": rate}} for rate in ("auto", 0.2)]
    data = data_of(*(one | {"metric": "points_lost", "at_most": 9.0} for one in low))
    data["base"] = tiny_trial("gone", **WEIGHTS, **{"pruning.structure": "channels", "distillation.bn_mode": "paired"})
    data["grid"] = GRID | {"distillation.learning_rate": ["auto", 0.2]}
    code, lines, err = checked(data, rows_of(data))
    assert code == 0 and err.startswith("teacher gone cannot be opened here")
    assert len(lines) == 3 and all("(2 of 2 trials)" in line for line in lines[:2])


def test_a_tiny_run_and_other_settings_cannot_be_compared(checked):
    data = data_of({"where": LOW, "metric": "points_lost", "at_most": 9.0})
    code, lines, err = checked(data, rows_of(data, tiny=True))
    assert (code, lines) == (2, []) and "tiny size" in err and len(err.splitlines()) == 1
    rows = [row | {"distillation.temperature": 9.0} for row in rows_of(data)]
    code, lines, err = checked(data, rows)
    assert (code, lines) == (2, []) and "differs in distillation.temperature" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("column", ["teacher_hash", "test_sha256"])
def test_rows_of_two_networks_or_test_sets_are_never_one_mean(checked, column):
    rows = rows_of(data := data_of({"where": LOW, "metric": "points_lost", "at_most": 9.0}))
    rows[0][column] = "f" * 64
    code, lines, err = checked(data, rows)
    assert (code, lines) == (2, []) and f"differ in {column}" in err


def test_a_place_that_knows_no_sweep_needs_one_and_another_file_can_be_given(checked, run_cli, tmp_path):
    data = data_of({"where": LOW, "metric": "points_lost", "at_most": 9.0})
    strict = write_yaml(tmp_path / "strict.yaml", data_of({"where": LOW, "metric": "points_lost", "at_most": 1.0}))
    assert checked(data, rows_of(data))[0] == 0
    assert checked(data, rows_of(data), "--sweep", str(strict))[0] == 1
    (tmp_path / "place" / "sweep.yaml").unlink()
    done = run_cli("results", str(tmp_path / "place"), "--check")
    assert done.code == 2 and "give the file with --sweep" in done.err
    sentence = write_yaml(tmp_path / "sentence.yaml", data | {"about": ABOUT})
    done = run_cli("results", str(tmp_path / "place"), "--check", "--sweep", str(sentence))
    assert done.code == 2 and "it is a sentence" in done.err
    done = run_cli("results", str(tmp_path / "place"), "--sweep", str(strict))
    assert done.code == 2 and "--sweep goes with --check" in done.err


def test_a_rows_file_can_be_checked(checked, run_cli, tmp_path):
    data = data_of({"where": LOW, "metric": "points_lost", "at_most": 9.0})
    checked(data, rows_of(data))
    file, rows = write_yaml(tmp_path / "s.yaml", data), str(tmp_path / "rows.parquet")
    assert run_cli("results", str(tmp_path / "place"), "--out", rows).code == 0
    assert run_cli("results", rows, "--check", "--sweep", str(file)).code == 0
    assert "give the file with --sweep" in run_cli("results", rows, "--check").err


@pytest.mark.parametrize(
    ("one", "says"),
    [
        ({"metric": "points_lots", "at_most": 1}, "about.expected.0.metric: 'points_lots': no metric of a trial; did"),
        ({"metric": "status", "at_most": 1}, "no metric of a trial"),
        ({"metric": "points_lost"}, "expected at_least, at_most or both"),
        ({"metric": "points_lost", "at_least": 2, "at_most": 1}, "at_least=2 is above at_most=1"),
        ({"metric": "points_lost", "at_most": True}, "input should be a number"),
        ({"metric": "points_lost", "at_most": "1"}, "input should be a number"),
        ({"metric": "points_lost", "at_most": float("nan")}, "expected"),
        ({"metric": "points_lost", "at_most": 1, "to": 2}, "about.expected.0.to: unknown field"),
        ({"at_most": 1}, "about.expected.0.metric: missing"),
        ({"metric": "points_lost", "at_most": 1, "of": "worst"}, "about.expected.0.of"),
        ({"metric": "points_lost", "at_most": 1, "where": {"pruning.sparcity": 1}}, "unknown field; did you mean"),
        ({"metric": "points_lost", "at_most": 1, "where": {"pruning.sparsity": 7}}, "pruning.sparsity"),
        ({"metric": "points_lost", "at_most": 1, "where": {"pruning.sparsity": 0.7}}, "no trial of the sweep has"),
        ({"metric": "points_lost", "at_most": 1}, "a mean over 4 trials that differ in pruning.sparsity, not in seeds"),
        ({"metric": "points_lost", "at_most": 1, "where": {"pruning.sparsity": []}}, "no trial of the sweep has"),
        ("at most 1", "about.expected.0: input should be a mapping"),
    ],
)
def test_a_wrong_range_is_one_line_before_anything_starts(tmp_path, run_cli, one, says):
    file = write_yaml(tmp_path / "s.yaml", data_of(one))
    done = run_cli("sweep", str(file), "--results", str(tmp_path / "out"))
    lines = [line for line in done.err.splitlines() if "about.expected" in line]
    assert done.code == 2 and len(lines) == 1 and says in lines[0], done.err


def test_a_search_has_no_ranges_and_the_best_is_of_one_teacher():
    ranges = ({"metric": "points_lost", "at_most": 1, "of": "best"},)
    space = {"space": GRID, "num_trials": 2}
    with pytest.raises(ValueError, match="ranges go with grid"):
        sweep.parse(data_of(*ranges, search=space, grid=None, seeds=1))
    two = data_of(*ranges, grid=GRID | {"teacher": ["a", "b"]})
    with pytest.raises(ValueError, match="the best of several teachers' students"):
        sweep.expand(sweep.parse(two), {})
    assert sweep.expand(sweep.parse(two), {"distillation.temperature": 2.0}), "other settings: nothing to hold"


def test_the_schema_takes_ranges_and_sentences_and_nothing_else():
    schema = sweep.json_schema()
    good = {"where": LOW, "metric": "points_lost", "at_most": 1.0}
    for about in (ABOUT, ABOUT | {"expected": [good]}):
        jsonschema.validate(data_of() | {"about": about}, schema)
    for expected in ([], [good | {"to": 1}], 3, [{"at_most": 1.0}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data_of() | {"about": ABOUT | {"expected": expected}}, schema)


def test_ranges_are_not_kept_with_another_effort():
    settings = sweep.parse(data_of({"where": LOW, "metric": "points_lost", "at_most": 9.0}))
    changed = sweep.without_ranges(settings, "none")
    assert changed.about is not None and changed.about.expected == "none" and changed.grid == settings.grid
    with pytest.raises(ValueError, match="a sentence"):
        checking.ranges_of(changed)


def test_the_report_shows_ranges_in_words(run_cli, tmp_path):
    data = data_of(
        {"where": LOW, "metric": "points_lost", "at_most": 9.0}, {"metric": "wall_s", "at_least": 1, "of": "best"}
    )
    place = tmp_path / "place"
    results.write(place, "trials", rows_of(data), "all")
    (place / "sweep.yaml").write_bytes(runner.as_yaml(sweep.parse(data)))
    assert run_cli("report", str(place)).code == 0
    page = (place / "report.html").read_text()
    words = "points_lost at pruning.sparsity=0.5: at most 9; wall_s, of the lowest reference_kl: at least 1"
    assert words in re.sub(r"<[^>]+>", "", page)


def test_rows_that_real_trials_leave_are_recognised_as_their_sweeps(tiny_teacher, tmp_path, run_cli):
    """Synthesis, pruning and distillation of two trials; no test data, so only distances are known."""
    ranges = [{"metric": "reference_kl", "at_most": 50.0, "of": "best"}]
    ranges += [{"metric": "points_lost", "at_most": 1.0, "where": LOW}]
    data = tiny_sweep(str(tiny_teacher), GRID) | {"about": ABOUT | {"expected": ranges}}
    settings = sweep.parse(data)
    for job in sweep.prepare(settings, bundles.load).jobs:
        sweep.run_job(job, trial.Inputs(images=trial.Local()), tmp_path / "out")
    file = write_yaml(tmp_path / "s.yaml", data)
    done = run_cli("results", str(tmp_path / "out"), "--check", "--sweep", str(file))
    assert done.code == 1 and "ok       all trials: reference_kl" in done.out, done.out + done.err
    assert "no rows  pruning.sparsity=0.5: points_lost nothing measured (0 of 1 trials)" in done.out
