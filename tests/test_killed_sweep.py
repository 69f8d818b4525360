"""A sweep that is killed ends, after the same command again, with the table of one that was not."""

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


def disturbed(words: list[str], folder: Path, log: Path) -> None:
    """Kill a trial as soon as trials run, at a random moment; after a further row kill the driver, then go on."""
    rng, driver = random.Random(4), start(words, log)

    def wait_for_trials(num_rows: int) -> list[int]:
        while rows_of(folder) < num_rows or not (running := trials_of(driver.pid)):
            assert driver.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        return running

    wait_for_trials(0)
    time.sleep(rng.uniform(0.0, 0.7))
    num_rows = rows_of(folder)
    kill([rng.choice(wait_for_trials(0))])
    wait_for_trials(num_rows + 1)
    time.sleep(rng.uniform(0.0, 0.7))
    own = descendants(driver.pid)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, log.read_text()[-3000:]
    # Ray's two agents notice within a minute; what computes or writes is gone at once.
    left = wait_gone([pid for pid in own if b"Agent" not in command_of(pid)])
    assert not left, [command_of(pid)[:60] for pid in left]
    assert start(words, log).wait(timeout=900) == 0, log.read_text()[-3000:]


@pytest.mark.timeout(2400)
def test_six_trials_killed_twice_end_with_the_table_of_an_undisturbed_run(tiny_teacher, tmp_path):
    data = sweep_of_twelve(tiny_teacher)
    del data["grid"]["distillation.temperature"]
    write_yaml(tmp_path / "six.yaml", data)
    folder, log = tmp_path / "killed", tmp_path / "log"
    words = ["sweep", str(tmp_path / "six.yaml"), "--results", str(folder), "--cache", str(tmp_path / "cache")]
    words += ["--test-data", "none", "--synthesizers", "1"]
    disturbed(words, folder, log)

    # Undisturbed: one process, one trial after the other, no Ray.
    jobs = jobs_of(data)
    alone = tmp_path / "alone"
    for job in jobs:
        sweep.run_job(job, trial.Inputs(images=trial.Local(tmp_path / "other cache")), alone)
    wanted = results.read(alone, "trials")
    assert len(wanted) == 6 and set(wanted["status"]) == {"finished"}

    pd.testing.assert_frame_equal(comparable(folder, "trials", ["trial_id"]), comparable(alone, "trials", ["trial_id"]))
    parts = [pq.read_table(part) for part in sorted((folder / "trials").glob("*.parquet"))]  # each is whole
    assert sum(part.num_rows for part in parts) == 6, "no row is doubled"
    here, there = (deterministic(results.read(place, "synthesis"), "synthesis") for place in (folder, alone))
    pd.testing.assert_frame_equal(here, there)
    for job in jobs:
        names = [(place / "students" / job.id / "weights.safetensors").read_bytes() for place in (folder, alone)]
        assert names[0] == names[1]
    assert not list((folder / "checkpoints").glob("*")) and not list((folder / "students").glob(".*"))
    printed = log.read_text()
    assert "6 trials, 0 failed" in printed and "Traceback" not in printed
