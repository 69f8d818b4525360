"""A sweep killed again and again ends with the table of one that was not."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from commands import command_of, kill, trials_of, wait_gone
from dfkd_ray import results, sweep, trial
from dfkd_ray.cli.live import descendants
from helpers import jobs_of, sweep_of_twelve, write_yaml
from table_rows import comparable, deterministic


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`dfkd-ray` with some words, its output in a file."""
    with log.open("ab") as out:
        command = [sys.executable, "-m", "dfkd_ray", *words]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def rows_of(folder: Path) -> int:
    """Parts of the trials table."""
    return len(list((folder / "trials").glob("*.parquet")))


def disturbed(words: list[str], folder: Path, log: Path, plan: list[list[str]]) -> None:
    """A session for each list of `plan`: its targets, a trial or the driver, are killed one after the other while
    trials run, the first at once and each other one after a further row, at a random moment."""
    rng = random.Random(4)
    for targets in plan:
        driver = start(words, log)
        for number, target in enumerate(targets):
            wanted = rows_of(folder) + min(number, 1)
            while rows_of(folder) < wanted or not trials_of(driver.pid):
                assert driver.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            time.sleep(rng.uniform(0.0, 0.7))
            own = descendants(driver.pid)
            if target == "trial":
                victims = trials_of(driver.pid)
                while not victims:
                    assert driver.poll() is None, log.read_text()[-3000:]
                    victims = trials_of(driver.pid)
                kill([rng.choice(victims)])
            else:
                kill([driver.pid])
                driver.wait()
                # Ray's two agents notice within a minute; what computes or writes is gone at once.
                left = wait_gone([pid for pid in own if b"Agent" not in command_of(pid)])
                assert not left, [command_of(pid)[:60] for pid in left]
        code = driver.wait(timeout=900)
        assert code == (-signal.SIGKILL if "driver" in targets else 0), log.read_text()[-3000:]


@pytest.mark.timeout(2400)
def test_eight_trials_killed_three_times_end_with_the_table_of_an_undisturbed_run(tiny_teacher, tmp_path):
    data = sweep_of_twelve(tiny_teacher)
    data["grid"]["pruning.sparsity"] = [0.5, 0.9]
    write_yaml(tmp_path / "eight.yaml", data)
    folder, log = tmp_path / "killed", tmp_path / "log"
    words = ["sweep", str(tmp_path / "eight.yaml"), "--results", str(folder), "--cache", str(tmp_path / "cache")]
    words += ["--test-data", "none", "--synthesizers", "1"]
    disturbed(words, folder, log, [["trial", "driver"], ["trial"]])

    # Undisturbed: one process, one trial after the other, no Ray.
    jobs = jobs_of(data)
    alone = tmp_path / "alone"
    for job in jobs:
        sweep.run_job(job, trial.Inputs(images=trial.Local(tmp_path / "other cache")), alone)
    wanted = results.read(alone, "trials")
    assert len(wanted) == 8 and set(wanted["status"]) == {"finished"}

    pd.testing.assert_frame_equal(comparable(folder, "trials", ["trial_id"]), comparable(alone, "trials", ["trial_id"]))
    parts = [pq.read_table(part) for part in sorted((folder / "trials").glob("*.parquet"))]  # each is whole
    assert sum(part.num_rows for part in parts) == 8, "no row is doubled"
    here, there = (deterministic(results.read(place, "synthesis"), "synthesis") for place in (folder, alone))
    pd.testing.assert_frame_equal(here, there)
    for job in jobs:
        names = [(place / "students" / job.id / "weights.safetensors").read_bytes() for place in (folder, alone)]
        assert names[0] == names[1]
    assert not list((folder / "checkpoints").glob("*")) and not list((folder / "students").glob(".*"))
    printed = log.read_text()
    assert "8 trials, 0 failed" in printed and "Traceback" not in printed
