"""`dfkd-ray results`: which rows, in which order, in which form."""

import io
import json
import math
import statistics
import subprocess
import sys

import pandas as pd
import pytest

from dfkd_ray import results
from table_rows import ACCURACIES, trial_row


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three sparsities, two seeds of each, a trial of another method, and a failed one."""
    folder = tmp_path_factory.mktemp("results")
    points = [(sparsity, seed) for seed in (0, 1) for sparsity in (0.5, 0.75, 0.9)]
    rows = [trial_row(index, *point) for index, point in enumerate(points)]
    failed = trial_row(0, 0.95, 0, trial_id="t-bad", status="failed", reason="a | b_c & 5 %", agreement=None)
    noise = trial_row(0, 0.5, 0, trial_id="t-noise", agreement=0.1)
    noise = noise | {"synthesis.method": "noise", "synthesis.bn_weight": None, "synthesis.num_steps": None}
    for row in [*rows, failed, noise]:
        results.write(folder, "trials", [row], row["trial_id"])
    looks = [{"trial_id": "t-0", "step": step, "agreement": 0.5 + step / 10, "kl": 1e-5 * step} for step in (0, 2)]
    results.write(folder, "epochs", looks, "t-0")
    return str(folder)


@pytest.fixture
def ids(run_cli, place):
    """The trials that a command names, in its order."""

    def run(*words):
        done = run_cli("results", place, "--format", "json", "--columns", "trial_id", *words)
        assert done.code == 0, done.err
        return [row["trial_id"].removeprefix("t-") for row in json.loads(done.out)]

    return run


@pytest.mark.parametrize(
    "conditions, expected",
    [
        ([], ["0", "3", "1", "4", "2", "5", "noise", "bad"]),
        (["pruning.sparsity>=0.75", "status=finished"], ["1", "4", "2", "5"]),
        (["sparsity<0.75", "synthesis.method=deepinversion"], ["0", "3"]),
        (["synthesis.method!=deepinversion"], ["noise"]),
        (["agreement=null"], ["bad"]),
        (["reason!=null"], ["bad"]),
        (["bn_weight=null"], ["noise"]),
        (["agreement > 0.7", " sparsity <= 0.75 "], ["0", "3", "1", "4"]),
        (["agreement==0.88"], ["3"]),
        (["agreement!=0.88", "synthesis.seed=1"], ["4", "5"]),
        (["real_data=true"], []),
        (["distillation.num_steps<1e9", "wall_s>=14"], ["4", "5"]),
    ],
)
def test_conditions_that_all_must_hold_choose_the_rows(ids, conditions, expected):
    assert ids(*(word for condition in conditions for word in ("--where", condition))) == expected


def test_rows_are_sorted_by_columns_either_way_nulls_last_and_cut(ids):
    assert ids("--sort", "agreement") == ["noise", "5", "2", "4", "1", "3", "0", "bad"]
    assert ids("--sort", "-sparsity", "--sort", "agreement", "--limit", "3") == ["bad", "5", "2"]
    assert ids("--sort", "-agreement")[-1] == "bad"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--where", "agrement>0.5"], "'agrement': no such column; did you mean agreement?"),
        (["--where", "seed=0"], "the end of several columns; expected one of synthesis.seed"),
        (["--where", "agreement"], "expected NAME, one of"),
        (["--where", "agreement>high"], "agreement is a number, 'high' is none"),
        (["--where", "agreement>=nan"], "agreement is a number, 'nan' is none"),
        (["--columns", ""], "expected names of columns"),
        (["--where", "status>a"], "status is text"),
        (["--where", "real_data>true"], "real_data is true or false"),
        (["--where", "agreement<null"], "null has no order"),
        (["--where", "__import__('os')=1"], "expected NAME"),
        (["--sort", "speed"], "'speed': no such column"),
        (["--columns", "trial_id,speed"], "'speed': no such column"),
        (["--out", "table.xlsx"], "say which with --format"),
        (["--mean-std", "--table", "epochs"], "--mean-std is for --table trials"),
        (["--table", "synthesis"], "no synthesis table there"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_was_expected(run_cli, place, words, message):
    done = run_cli("results", place, *words)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1 and not done.out, done.err


def test_the_printed_table_has_what_differs_and_what_came_of_it(run_cli, place):
    done = run_cli("results", place)
    heading = done.out.splitlines()[0].split()
    assert {"teacher", "sparsity", "method", "trial_id", "agreement", "wall_s", "reason"} <= set(heading)
    assert "temperature" not in heading and "recovered_accuracy" not in heading, "the same in all, null in all"
    assert "net_20" in done.out and "some/where" not in done.out
    assert done.out.splitlines()[-1] == "8 rows; 8 in trials"


def test_a_table_of_looks_is_printed_too(run_cli, place):
    done = run_cli("results", place, "--table", "epochs", "--where", "step>0")
    heading, row = (done.out.splitlines()[index].split() for index in (0, 2))
    assert dict(zip(heading, row, strict=True)) == {"trial_id": "t-0", "step": "2", "agreement": "0.7", "kl": "2e-05"}


def test_csv_has_all_columns_and_digits_and_whole_numbers(run_cli, place):
    done = run_cli("results", place, "--format", "csv")
    frame = pd.read_csv(io.StringIO(done.out))
    assert list(frame.columns) == results.schema("trials").names and len(frame) == 8
    text = pd.read_csv(io.StringIO(done.out), dtype=str)
    steps = dict(zip(text["trial_id"], text["synthesis.num_steps"], strict=True))
    assert steps["t-0"] == "60" and math.isnan(steps["t-noise"])
    read = results.read(place, "trials")
    assert frame["agreement"].equals(read["agreement"]) and frame["written_at_s"].equals(read["written_at_s"])


def test_json_keeps_types_and_nulls(run_cli, place):
    done = run_cli("results", place, "--format", "json", "--where", "trial_id=t-bad")
    (row,) = json.loads(done.out)
    assert row["agreement"] is None and row["real_data"] is False and row["stored_bytes"] == 1000
    assert row["pruning.sparsity"] == 0.95 and list(row) == results.schema("trials").names


def test_markdown_and_latex_escape_what_they_must(run_cli, place):
    words = ["results", place, "--columns", "trial_id,reason,agreement", "--where", "status=failed"]
    assert run_cli(*words, "--format", "markdown").out.splitlines() == [
        "| trial_id | reason | agreement |",
        "| --- | --- | ---: |",
        r"| t-bad | a \| b_c & 5 % | - |",
    ]
    latex = run_cli(*words, "--format", "latex").out
    assert r"t-bad & a | b\_c \& 5 \% & - \\" in latex and r"\begin{tabular}{llr}" in latex


def test_seeds_fold_into_mean_and_standard_deviation(run_cli, place):
    words = ["results", place, "--mean-std", "--where", "method=deepinversion"]
    rows = json.loads(run_cli(*words, "--format", "json").out)
    assert [(row["pruning.sparsity"], row["num_seeds"]) for row in rows] == [(0.5, 2), (0.75, 2), (0.9, 2)]
    for index, row in enumerate(rows):
        pair = (ACCURACIES[index], ACCURACIES[index + 3])
        assert row["agreement"] == pytest.approx(statistics.mean(pair))
        assert row["agreement_std"] == pytest.approx(statistics.stdev(pair))
    assert "synthesis.seed" not in rows[0] and "trial_id" not in rows[0]
    text = run_cli(*words, "--columns", "sparsity,agreement", "--sort", "agreement").out
    assert text.splitlines()[2].split() == ["0.9", "0.68", "±", "0.028"]
    assert "3 rows, 6 finished trials folded; 8 in trials" in text
    assert r"$\pm$" in run_cli(*words, "--format", "latex").out


def test_one_seed_has_no_spread_and_methods_are_not_folded_together(run_cli, place):
    rows = json.loads(run_cli("results", place, "--mean-std", "--format", "json").out)
    assert [row["num_seeds"] for row in rows] == [2, 2, 2, 1]
    assert rows[-1]["synthesis.method"] == "noise" and rows[-1]["agreement_std"] is None


def test_a_file_is_written_in_the_form_of_its_ending(run_cli, place, tmp_path):
    for name, start in (("a.csv", "trial_id,"), ("a.md", "| teacher"), ("a.tex", r"\begin{tabular}"), ("a.json", "[")):
        done = run_cli("results", place, "--out", str(tmp_path / "new" / name))
        assert done.out == f"written: {tmp_path / 'new' / name} (8 rows)\n"
        assert (tmp_path / "new" / name).read_text().startswith(start)


def test_help_loads_no_pandas():
    program = (
        "import sys\nfrom dfkd_ray import cli\nsys.argv = ['dfkd-ray', 'results', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print('LOADED', [name for name in ('pandas', 'pyarrow', 'torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900, check=True)
    assert "LOADED []" in done.stdout and "--mean-std" in done.stdout
