"""A method that looks at the student gives the same bytes alone, on fleets, and killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import WorkerCrashedError

from dfkd_ray import bundles, cache_entries, fleet, results
from dfkd_ray.batches import RoundState, summed
from dfkd_ray.config import METHODS
from helpers import Done, assert_one_error

TOYS = Path(__file__).parent / "toys"
PYTHONPATH = os.pathsep.join([str(TOYS), str(TOYS.parents[1])])
REFERENCE = {"num_images": 8, "synthesis": {"batch_size": 8, "num_steps": 1, "num_threads": 1}}
DISTILLATION = {"num_images": 48, "num_steps": 12, "batch_size": 8, "eval_every": 1, "num_threads": 1}


def config_of(teacher: Path, **synthesis) -> dict:
    return {
        "teacher": str(teacher),
        "bn_num_images": 16,
        "device": "cpu",
        "pruning": {"sparsity": 0.5},
        "reconstruction": {"num_images": 16},
        "synthesis": {"method": "toy_rounds", **synthesis},
        "distillation": {**DISTILLATION, "checkpoint_every": 1},
        "reference": REFERENCE,
    }


@dataclass
class Server:
    """A process that runs each trial and each command in a fork of its own; see toys/run_rounds.py."""

    process: subprocess.Popen[str]
    folder: Path

    def done(self, *words: str) -> Done:
        """What some words left."""
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([str(self.folder), *words]) + "\n")
        process.stdin.flush()
        return Done(int(process.stdout.readline()), *((self.folder / name).read_text() for name in ("out", "err")))

    def said(self, *words: str) -> str:
        """The standard output of a command that does not fail."""
        done = self.done(*words)
        assert done.code == 0, done
        return done.out

    def trial(self, config: dict, folder: Path) -> dict:
        """What a trial without Ray told."""
        return json.loads(self.said("trial", json.dumps(config), json.dumps(str(folder))))

    def kill_trial(self, config: dict, folder: Path, step: int) -> None:
        """Have it killed at a look."""
        done = self.done("trial", json.dumps(config), json.dumps(str(folder)), json.dumps(step))
        assert done.code == -9, done


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    environment, folder = {**os.environ, "PYTHONPATH": PYTHONPATH}, tmp_path_factory.mktemp("printed")
    words = [sys.executable, str(TOYS / "run_rounds.py")]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Server(process, folder)


@pytest.fixture(scope="module")
def fleets(tiny_teacher, tmp_path_factory) -> Iterator[dict[int, fleet.Fleet]]:
    """Fleets by their number of synthesizers, in one Ray session whose processes know the toy methods."""
    teacher, folder = bundles.load(str(tiny_teacher)), tmp_path_factory.mktemp("fleets")

    def settings(size: int) -> fleet.Settings:
        return fleet.Settings(size, 0.1, cache_root=str(folder / str(size)), device="cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        with (
            fleet.connected(num_cpus=2, object_store_memory=200_000_000),
            fleet.started(settings(1), [teacher]) as one,
            fleet.started(settings(2), [teacher]) as two,
        ):
            yield {1: one, 2: two}


# The shipped methods in rounds, made small: 3 rounds of two batches of 8 images.
SMALL_GENERATOR = {"num_channels": 4, "num_inputs": 4}
ADAPTIVE: dict[str, dict[str, Any]] = {
    "adi": {"adaptive_steps": 1},
    "dfq": SMALL_GENERATOR,
    "dafl": SMALL_GENERATOR,
    "dfad": SMALL_GENERATOR,
    "zskt": SMALL_GENERATOR,
    "cmi": {**SMALL_GENERATOR, "num_projected": 4, "bank_size": 20, "num_negatives": 6},
    "fast": SMALL_GENERATOR,
    "nayer": SMALL_GENERATOR,
}


def adaptive_config(teacher: Path, method: str) -> dict:
    small = {"batch_size": 8, "num_rounds": 3, "num_steps": 1, "num_threads": 1, **ADAPTIVE[method]}
    return config_of(teacher, method=method, lag=1, **small)


def in_ray(name: str, *arguments: Any) -> Any:
    """What a function of toys/run_rounds.py returns in a process of the session."""

    def call(*arguments: Any) -> Any:
        import run_rounds

        return getattr(run_rounds, name)(*arguments)

    task: Any = ray.remote(num_cpus=0, max_retries=0)(call)
    return ray.get(task.remote(*arguments))


def on_fleet(running: fleet.Fleet, config: dict, folder: Path, kill_at: int | None = None) -> dict:
    """What a trial told that reads its images from a fleet."""
    return json.loads(in_ray("told", config, str(folder), kill_at, running))


@pytest.fixture(scope="module")
def alone(server, tiny_teacher, tmp_path_factory) -> dict[int, dict]:
    """The undisturbed trial in one process, by lag."""
    folder = tmp_path_factory.mktemp("alone")
    return {lag: server.trial(config_of(tiny_teacher, lag=lag), folder / str(lag)) for lag in (0, 1)}


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
@pytest.mark.parametrize("synthesizers", [1, 2])
def test_a_fleet_of_any_size_gives_the_same_bytes(alone, fleets, tiny_teacher, tmp_path, lag, synthesizers):
    config = config_of(tiny_teacher, lag=lag)
    assert on_fleet(fleets[synthesizers], config, tmp_path) == alone[lag]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("step", [2, 4, 5, 8, 11])
def test_a_trial_that_is_killed_in_any_round_goes_on_to_the_same_bytes(
    alone, server, tiny_teacher, tmp_path, lag, step
):
    config = config_of(tiny_teacher, lag=lag)
    server.kill_trial(config, tmp_path, step)
    assert list((tmp_path / "checkpoints").glob("t-*/round-*.safetensors"))
    assert server.trial(config, tmp_path) == alone[lag]


def test_a_trial_that_is_killed_on_a_fleet_goes_on_to_the_same_bytes(alone, fleets, tiny_teacher, tmp_path):
    config = config_of(tiny_teacher, lag=1)
    with pytest.raises(WorkerCrashedError):
        on_fleet(fleets[2], config, tmp_path / "killed", kill_at=6)
    for size, running in fleets.items():  # one that has not seen the trial, and the one where it was killed
        shutil.copytree(tmp_path / "killed", tmp_path / str(size))
        assert on_fleet(running, config, tmp_path / str(size)) == alone[1]


@pytest.mark.parametrize("damage", ["cut", "gone", "state cut", "state gone"])
def test_rounds_that_are_damaged_are_made_anew_and_never_mixed(alone, server, tiny_teacher, tmp_path, damage):
    config = config_of(tiny_teacher)
    server.kill_trial(config, tmp_path, 9)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    path = folder / ("rounds.safetensors" if "state" in damage else "round-000001.safetensors")
    if "gone" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert server.trial(config, tmp_path) == alone[0]


def test_only_rounds_that_have_seen_no_student_are_kept_in_the_cache(server, tiny_teacher, tmp_path):
    server.trial(config_of(tiny_teacher), tmp_path / "looks")
    server.trial(config_of(tiny_teacher, student_weight=0.0), tmp_path / "does not look")
    kept = {}
    for name in ("looks", "does not look"):
        entries = [e for e in cache_entries.entries(tmp_path / name / "cache") if e.manifest]
        entries = [e for e in entries if (e.manifest or {}).get("config", {})["method"] == "toy_rounds"]
        kept[name] = sum(entry.num_batches for entry in entries)
    assert kept == {"looks": 2, "does not look": 6}, "round 0; all rounds"
    again = server.trial(config_of(tiny_teacher, student_weight=0.0, lag=0), tmp_path / "does not look")
    assert again["row"]["status"] == "finished"


def test_a_student_of_another_architecture_is_looked_at(server, fleets, tiny_teacher, tmp_path):
    student = {"architecture": "resnet8", "arguments": {"width_multiplier": 0.25}}
    config = {**config_of(tiny_teacher), "student": student, "pruning": {"sparsity": 0.0}}
    assert server.trial(config, tmp_path / "1") == on_fleet(fleets[1], config, tmp_path / "2")


def test_every_method_in_rounds_is_tested_here():
    assert set(ADAPTIVE) == {name for name, row in METHODS.items() if not row.is_stationary}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_adaptive_method_gives_the_same_bytes_alone_on_a_fleet_and_killed(
    server, fleets, tiny_teacher, tmp_path, method
):
    config = adaptive_config(tiny_teacher, method)
    told = server.trial(config, tmp_path / "alone")
    assert told["row"]["status"] == "finished" and [batch[0] for batch in told["batches"]] == [0, 0, 1, 1, 2, 2]
    assert len({batch[2] for batch in told["batches"]}) == 6, "no two batches are equal"
    assert on_fleet(fleets[2], config, tmp_path / "fleet") == told
    server.kill_trial(config, tmp_path / "killed", 6)
    assert server.trial(config, tmp_path / "killed") == told


def test_adi_begins_with_the_images_of_deepinversion_and_shares_them(server, tiny_teacher, tmp_path):
    config = adaptive_config(tiny_teacher, "adi")
    told = server.trial(config, tmp_path)
    keys = {e.manifest["key"]: e.num_batches for e in cache_entries.entries(tmp_path / "cache") if e.manifest}
    plain = config | {"synthesis": {"method": "deepinversion", "batch_size": 8, "num_steps": 1, "num_threads": 1}}
    plainly = server.trial(plain, tmp_path)
    assert [b[2] for b in plainly["batches"][:2]] == [b[2] for b in told["batches"][:2]], "the same images"
    assert plainly["row"]["synthesis_key"] in keys, "in the cache for both"
    assert sorted(keys.values()) == [1, 2], "the reference set and round 0; rounds that saw a student are not kept"


def test_more_rounds_than_steps_are_refused(server, tiny_teacher, tmp_path):
    words = ["recover", str(tiny_teacher), "--out", str(tmp_path / "o")]
    for field in ("synthesis.method=toy_rounds", "synthesis.num_rounds=9", "distillation.num_steps=3"):
        words += ["--set", field]
    assert_one_error(server.done(*words), 2, "synthesis.num_rounds=9 needs a step of distillation each")


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
def swept(server, fleets, tiny_teacher, tmp_path_factory) -> tuple[Path, str, str]:
    """A sweep of both toy methods in the session: its results, and what its dry run and the sweep itself said."""
    folder = tmp_path_factory.mktemp("toys")
    base = {key: value for key, value in config_of(tiny_teacher).items() if key != "synthesis"}
    grid = [
        {"synthesis.method": ["toy_rounds"], "synthesis.lag": [0, 1]},
        {"synthesis.method": ["toy_term"], "synthesis.sharpness_weight": [0.5, 1.5]},
    ]
    (folder / "toys.json").write_text(json.dumps({"base": base, "grid": grid}))
    words = ["sweep", str(folder / "toys.json"), "--test-data", "none"]
    words += ["--results", str(folder / "out"), "--cache", str(folder / "cache"), "--synthesizers", "1"]
    dry = server.said(*words, "--dry-run")
    code, said = in_ray("printed", words)
    assert code == 0, said
    return folder / "out", dry, said


def test_toy_methods_pass_through_a_sweep_to_the_numbers_of_a_trial_alone(swept, server, alone):
    place, dry, said = swept
    assert "4 trials" in dry and "toy_rounds" in dry and "toy_term" in dry and "estimated" in dry
    rows = json.loads(server.said("results", str(place), "--format", "json"))
    by_lag = {row["synthesis.lag"]: row for row in rows if row["synthesis.method"] == "toy_rounds"}
    for lag, told in alone.items():
        for name in ("trial_id", "images_sha256", "agreement", "reference_kl", "synthesis_key", "num_images"):
            assert by_lag[lag][name] == told["row"][name], (lag, name)
    assert "4/4" in said and len(rows) == 4
    assert "several synthesis methods (toy_rounds, toy_term): KL" in said


def test_a_new_term_is_a_column_by_itself_and_methods_share_what_can_be_shared(swept, server):
    rows = json.loads(server.said("results", str(swept[0]), "--table", "synthesis", "--format", "json"))
    assert {row["method"] for row in rows if row["sharpness"] is not None} == {"toy_term"}
    assert {row["method"] for row in rows if row["shift"] is not None} == {"toy_rounds"}
    rounds = [row["round"] for row in rows if row["method"] == "toy_rounds"]
    assert sorted(rounds) == [0] * 4 + [1] * 4 + [2] * 4


def test_results_and_report_show_them(swept, server):
    place = swept[0]
    told = server.said("results", str(place), "--table", "synthesis", "--format", "csv")
    assert "sharpness" in told.splitlines()[0] and "toy_rounds" in told
    server.said("report", str(place))
    assert "toy_term" in (place / "report.html").read_text()


def test_a_package_without_that_method_says_which_columns_it_does_not_know(swept):
    with pytest.raises(ValueError, match="does not know its columns"):
        results.read(swept[0], "synthesis")
