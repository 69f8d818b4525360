"""`shrink`: the sweep that it makes, its candidates, its choice, and one run of the command."""

from typing import Any

import pytest

from commands import MODULE, done
from dfkd_ray import results, sweep
from dfkd_ray.cli.shrink import lines
from dfkd_ray.sweep import shrinking
from helpers import TINY_SETS, refusal, set_words


def row(**values: Any) -> dict[str, Any]:
    """A finished trial's row: half of the MACs, twice as fast, in int8 three times."""
    measured = {"trial_id": "t-0", "status": "finished", "num_macs": 50, "teacher_num_macs": 100}
    measured |= {
        "pruning.importance": "magnitude",
        "teacher_accuracy": 0.9,
        "recovered_accuracy": 0.89,
        "quantised_accuracy": 0.885,
    }
    measured |= {"reference_kl": 0.01, "quantised_kl": 0.02, "latency_ratio": 2.0, "int8_latency_ratio": 3.0}
    return measured | {"float_file_bytes": 4000, "int8_file_bytes": 1200} | values


@pytest.mark.parametrize("faster", [1.2, 2.0, 8.0])
def test_the_sweep_keeps_fewer_multiplications_the_faster_it_is_to_be(tiny_teacher, faster):
    data = shrinking.sweep_of(str(tiny_teacher), faster, fields={"distillation.num_steps": 7})
    dense, channels = data["grid"]
    shares = channels["pruning.sparsity"]
    assert dense["pruning.sparsity"] == [0.0] and shares == sorted(set(shares)) and 0 < shares[0] < shares[-1] < 1
    assert shares[0] < 1 - 1 / faster + 1e-9, (
        "one of them keeps more than the speed asks for: the loss may be too large"
    )
    configs = sweep.expand(sweep.parse(data), {})
    assert len(configs) == 1 + 2 * len(shares) and {each.distillation.num_steps for each in configs} == {0, 7}
    one = shrinking.sweep_of("t", faster, int8=False, fields={"pruning.importance": "activations"})
    assert one["grid"] == [{"pruning.sparsity": shares, "pruning.importance": ["activations"]}]
    without = shrinking.sweep_of(str(tiny_teacher), faster, int8=False)
    assert len(without["grid"]) == 1 and not without["base"]["quantisation"]["int8"]


@pytest.mark.parametrize("faster", [1.0, 0.5, 21.0, float("nan")])
def test_a_speed_that_cannot_be_sought_is_refused(faster):
    refusal(lambda: shrinking.check(faster, 0.5), "expected more than 1 and at most 20")


def test_a_row_gives_a_student_and_its_int8_file_and_what_has_no_number_is_no_candidate():
    found = shrinking.candidates([row(), row(status="failed"), row(trial_id="t-1", latency_ratio=None)])
    assert [(each.trial_id, each.is_int8, each.speed) for each in found] == [
        ("t-0", True, 3.0),
        ("t-1", True, 3.0),
        ("t-0", False, 2.0),
    ]
    assert [round(each.lost, 6) for each in found] == [1.5, 1.5, 1.0] and found[0].num_bytes == 1200
    assert found[0].name == "-50 % MACs by magnitude, int8"
    for column in ("latency_ratio", "int8_latency_ratio"):
        (int8, student) = shrinking.candidates([row(latency_warning=f"slow; {column} is doubtful: half of the runs")])
        assert (student.is_doubtful, int8.is_doubtful) == (column == "latency_ratio", column != "latency_ratio")
        assert sum(" x?" in line for line in lines([int8, student], measured=True)) == 1
    dense = shrinking.candidates([row(num_macs=100, latency_ratio=None)])
    assert [each.name for each in dense] == ["all channels, int8"]


def test_the_choice_loses_least_of_what_is_fast_enough_and_nothing_is_chosen_that_loses_too_much():
    rows = [
        row(trial_id=name, latency_ratio=speed, recovered_accuracy=0.9 - lost / 100, int8_latency_ratio=None)
        for name, speed, lost in (("a", 1.5, 0.1), ("b", 2.0, 0.4), ("c", 2.5, 0.4), ("d", 4.0, 2.0))
    ]
    found = shrinking.candidates(rows)

    def chosen(faster: float, lose: float) -> str | None:
        best = shrinking.choose(found, faster, lose)
        return None if best is None else best.trial_id

    assert chosen(2.0, 0.5) == "c", "the faster of two that lose the same"
    assert chosen(1.2, 0.5) == "a" and chosen(3.0, 2.5) == "d" and chosen(3.0, 0.5) is None
    assert [each.trial_id for each in shrinking.nearest(found, 3.0, 0.5)] == ["c", "d"]
    assert shrinking.nearest(found, 9.0, 0.01) == []


def test_the_command_runs_the_sweep_exports_what_it_chose_and_says_when_nothing_fits(tiny_teacher, tmp_path):
    pytest.importorskip("onnxruntime")
    small = {**TINY_SETS, "latency.repeats": 3, "pruning.round_to": 1, "quantisation.num_images": 8}
    small |= {"pruning.importance": "magnitude", "pruning.sparsity": 0.4}  # one trial, beside the teacher in int8
    fields = set_words({name: value for name, value in small.items() if name != "teacher"})
    words = [*MODULE, "shrink", str(tiny_teacher), "--out", "found", "--cache", "cache", *fields]
    ran = done([*words, "--faster", "1.5", "--lose-at-most", "99999"], tmp_path)
    rows = results.read(tmp_path / "found" / "sweep", "trials")
    assert list(rows["status"]) == ["finished"] * 2, list(rows["reason"])
    assert "estimated without data, within a factor of about two" in ran.stdout, ran.stdout
    best = shrinking.choose(shrinking.candidates(rows.to_dict("records")), 1.5, 99999.0)
    file = tmp_path / "found" / "student.onnx"
    if best is None:  # on a busy machine nothing is faster
        assert ran.returncode == 1 and not file.exists()
    else:
        assert ran.returncode == 0 and best.trial_id in ran.stdout, ran.stderr
        assert file.stat().st_size > 1000
        card = (tmp_path / "found" / "student.onnx.md").read_text()
        assert f"trial `{best.trial_id}`" in card and ("- int8" in card) == best.is_int8
    ran = done([*words, "--faster", "1.5", "--lose-at-most", "0"], tmp_path)  # the trials are there
    assert ran.returncode == 1 and "nothing is 1.5 times as fast and loses at most 0 points" in ran.stdout, ran.stderr
    assert not file.exists(), "the file of an earlier choice is not left for this one's"


def test_a_folder_with_other_files_and_a_speed_that_cannot_be_sought_are_refused(tiny_teacher, tmp_path, run_cli):
    (tmp_path / "thesis.txt").write_text("mine")
    for words, said in (
        (["--out", str(tmp_path)], "thesis.txt"),
        (["--out", str(tmp_path / "new"), "--faster", "0.5"], "expected more than 1"),
        (
            ["--out", str(tmp_path / "new"), "--lose-at-most", "nan"],
            "expected a number of percentage points, 0 or more",
        ),
        (["--out", str(tmp_path / "new"), "--lose-at-most", "-1"], "expected a number of percentage points, 0 or more"),
    ):
        ran = run_cli("shrink", str(tiny_teacher), *words)
        assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1, ran.err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]
