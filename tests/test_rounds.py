"""A method that looks at the student gives the same bytes alone, on fleets, and killed and resumed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from commands import LIMIT_S
from dfkd_ray import cache_entries, results
from dfkd_ray.batches import RoundState, summed

TOYS = Path(__file__).parent / "toys"
RUN = TOYS / "run_rounds.py"
SERVER: list[subprocess.Popen[str]] = []
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOYS), str(TOYS.parents[1])])}
REFERENCE = {"num_images": 8, "synthesis": {"batch_size": 8, "num_steps": 1, "num_threads": 1}}
DISTILLATION = {"num_images": 48, "num_steps": 12, "batch_size": 8, "eval_every": 1, "num_threads": 1}


def config_of(teacher: Path, **synthesis) -> dict:
    return {
        "teacher": str(teacher),
        "bn_num_images": 16,
        "device": "cpu",
        "pruning": {"sparsity": 0.5},
        "synthesis": {"method": "toy_rounds", **synthesis},
        "distillation": {**DISTILLATION, "checkpoint_every": 1},
        "reference": REFERENCE,
    }


def command(words: list[str], code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """The process that runs trials without Ray."""
    words = [sys.executable, str(RUN), "serve"]
    with subprocess.Popen(words, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        SERVER.append(process)
        yield
        SERVER.clear()


def run(config: dict, folder: Path, *words: str, code: int = 0) -> dict:
    """What a trial told; with a fleet in a process of its own."""
    words = (json.dumps(config), str(folder), *words)
    if "--synthesizers" in words:
        said = command([str(RUN), *words], code).stdout
    else:
        (process,), out = SERVER, folder / "printed"
        assert process.stdin is not None and process.stdout is not None
        folder.mkdir(exist_ok=True)
        process.stdin.write(json.dumps([str(out), *words]) + "\n")
        process.stdin.flush()
        ended, said = process.stdout.readline(), out.read_text()
        assert ended == f"{code}\n", said
    return json.loads(said.splitlines()[-1]) if code == 0 else {}


@pytest.fixture(scope="module")
def alone(tiny_teacher, tmp_path_factory) -> dict[int, dict]:
    """The undisturbed trial in one process, by lag."""
    return {lag: run(config_of(tiny_teacher, lag=lag), tmp_path_factory.mktemp(f"alone{lag}")) for lag in (0, 1)}


def test_each_round_has_its_images_and_each_looks_at_another_student(alone):
    for told in alone.values():
        rounds = [batch[0] for batch in told["batches"]]
        assert rounds == [0, 0, 1, 1, 2, 2] and [batch[1] for batch in told["batches"]] == [0, 1, 2, 3, 4, 5]
        assert len({batch[2] for batch in told["batches"]}) == 6, "no two batches are equal"
        shifts = [batch[3] for batch in told["batches"]]
        assert shifts[0] == shifts[1] == 0.0 and len(set(shifts)) == 3
        assert told["row"]["num_images"] == 48 and told["row"]["status"] == "finished"
    first, second = (told["batches"] for told in alone.values())
    assert [batch[2] for batch in first[:2]] != [batch[2] for batch in second[:2]], "lag is part of the key"
    assert {batch[4] for batch in first} == {alone[0]["row"]["synthesis_key"]}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("synthesizers", [1, 3])
def test_a_fleet_of_any_size_gives_the_same_bytes(alone, tiny_teacher, tmp_path, lag, synthesizers):
    config = config_of(tiny_teacher, lag=lag)
    assert run(config, tmp_path, "--synthesizers", str(synthesizers)) == alone[lag]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("step", [2, 4, 5, 8, 11])
def test_a_trial_that_is_killed_in_any_round_goes_on_to_the_same_bytes(alone, tiny_teacher, tmp_path, lag, step):
    config = config_of(tiny_teacher, lag=lag)
    run(config, tmp_path, "--kill-at", str(step), code=-9)
    assert list((tmp_path / "checkpoints").glob("t-*/round-*.safetensors"))
    assert run(config, tmp_path) == alone[lag]


def test_a_trial_that_is_killed_on_a_fleet_goes_on_to_the_same_bytes(alone, tiny_teacher, tmp_path):
    config = config_of(tiny_teacher, lag=1)
    run(config, tmp_path, "--kill-at", "6", "--synthesizers", "2", code=-9)
    assert run(config, tmp_path, "--synthesizers", "2") == alone[1]


@pytest.mark.parametrize("damage", ["cut", "gone", "state cut", "state gone"])
def test_rounds_that_are_damaged_are_made_anew_and_never_mixed(alone, tiny_teacher, tmp_path, damage):
    config = config_of(tiny_teacher)
    run(config, tmp_path, "--kill-at", "9", code=-9)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    path = folder / ("rounds.safetensors" if "state" in damage else "round-000001.safetensors")
    if "gone" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert run(config, tmp_path) == alone[0]


def test_only_rounds_that_have_seen_no_student_are_kept_in_the_cache(alone, tiny_teacher, tmp_path):
    run(config_of(tiny_teacher), tmp_path / "looks")
    run(config_of(tiny_teacher, student_weight=0.0), tmp_path / "does not look")
    kept = {}
    for name in ("looks", "does not look"):
        entries = [e for e in cache_entries.entries(tmp_path / name / "cache") if e.manifest]
        entries = [e for e in entries if (e.manifest or {}).get("config", {})["method"] == "toy_rounds"]
        kept[name] = sum(entry.num_batches for entry in entries)
    assert kept == {"looks": 2, "does not look": 6}, "round 0; all rounds"
    again = run(config_of(tiny_teacher, student_weight=0.0, lag=0), tmp_path / "does not look")
    assert again["row"]["status"] == "finished"


def test_a_student_of_another_architecture_is_looked_at(tiny_teacher, tmp_path):
    student = {"architecture": "resnet8", "arguments": {"width_multiplier": 0.25}}
    config = {**config_of(tiny_teacher), "student": student, "pruning": {"sparsity": 0.0}}
    assert run(config, tmp_path / "1") == run(config, tmp_path / "2", "--synthesizers", "1")


def test_more_rounds_than_steps_are_refused(tiny_teacher, tmp_path):
    words = ["-m", "dfkd_ray", "recover", str(tiny_teacher), "--out", str(tmp_path / "o")]
    for field in ("synthesis.method=toy_rounds", "synthesis.num_rounds=9", "distillation.num_steps=3"):
        words += ["--set", field]
    done = command(words, code=2)
    assert "synthesis.num_rounds=9 needs a step of distillation each" in done.stderr


def test_contributions_are_added_up_in_the_order_of_their_batches():
    parts = [{"g": np.array([value], np.float32)} for value in (1e8, 1.0, -1e8)]
    assert summed(parts)["g"] == 0.0 and summed([parts[0], parts[2], parts[1]])["g"] == 1.0
    assert summed([]) == {} and parts[0]["g"] == np.float32(1e8)


def test_the_hash_of_a_state_tells_its_parts_apart():
    one, two = np.zeros(2, np.float32), np.ones(2, np.float32)
    states = [
        RoundState(0),
        RoundState(1),
        RoundState(0, {"a": one}),
        RoundState(0, {"b": one}),
        RoundState(0, {"a": two}),
        RoundState(0, {"a": one.astype(np.float64)}),
        RoundState(0, {"a": one.reshape(1, 2)}),
        RoundState(0, {"a": one[:1]}),
        RoundState(0, {"a": np.zeros((), np.float32)}),
        RoundState(0, {}, {"a": one}),
        RoundState(0, {}, {}),
    ]
    assert len({state.hash for state in states}) == len(states)
    assert RoundState(0, {"a": one, "b": two}).hash == RoundState(0, {"b": two, "a": one}).hash


@pytest.fixture(scope="module")
def swept(tiny_teacher, tmp_path_factory) -> tuple[Path, str, subprocess.CompletedProcess]:
    """A sweep of both toy methods, and what its dry run said."""
    folder = tmp_path_factory.mktemp("toys")
    base = {key: value for key, value in config_of(tiny_teacher).items() if key != "synthesis"}
    grid = [
        {"synthesis.method": ["toy_rounds"], "synthesis.lag": [0, 1]},
        {"synthesis.method": ["toy_term"], "synthesis.sharpness_weight": [0.5, 1.5]},
    ]
    (folder / "toys.json").write_text(json.dumps({"base": base, "grid": grid}))
    words = ["-m", "dfkd_ray", "sweep", str(folder / "toys.json"), "--test-data", "none"]
    words += ["--results", str(folder / "out"), "--cache", str(folder / "cache"), "--synthesizers", "2"]
    dry = command([*words, "--dry-run"])
    return folder / "out", dry.stdout, command(words)


def test_toy_methods_pass_through_a_sweep_to_the_numbers_of_a_trial_alone(swept, alone):
    place, dry, done = swept
    assert "4 trials" in dry and "toy_rounds" in dry and "toy_term" in dry and "estimated" in dry
    rows = json.loads(command(["-c", READ, str(place)]).stdout)
    by_lag = {row["synthesis.lag"]: row for row in rows if row["synthesis.method"] == "toy_rounds"}
    for lag, told in alone.items():
        for name in ("trial_id", "images_sha256", "agreement", "reference_kl", "synthesis_key", "num_images"):
            assert by_lag[lag][name] == told["row"][name], (lag, name)
    assert "4/4" in done.stdout and len(rows) == 4


READ = """
import json, sys
from dfkd_ray import results
frame = results.read(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "trials")
print(json.dumps(frame.astype(object).where(frame.notna(), None).to_dict("records"), default=str))
"""


def test_a_new_term_is_a_column_by_itself_and_methods_share_what_can_be_shared(swept):
    rows = json.loads(command(["-c", READ, str(swept[0]), "synthesis"]).stdout)
    assert {row["method"] for row in rows if row["sharpness"] is not None} == {"toy_term"}
    assert {row["method"] for row in rows if row["shift"] is not None} == {"toy_rounds"}
    rounds = [row["round"] for row in rows if row["method"] == "toy_rounds"]
    assert sorted(rounds) == [0] * 4 + [1] * 4 + [2] * 4


def test_results_and_report_show_them(swept, tmp_path):
    place = swept[0]
    told = command(["-m", "dfkd_ray", "results", str(place), "--table", "synthesis", "--format", "csv"]).stdout
    assert "sharpness" in told.splitlines()[0] and "toy_rounds" in told
    command(["-m", "dfkd_ray", "report", str(place)])
    assert "toy_term" in (place / "report.html").read_text()


def test_a_package_without_that_method_says_which_columns_it_does_not_know(swept):
    with pytest.raises(ValueError, match="does not know its columns"):
        results.read(swept[0], "synthesis")
