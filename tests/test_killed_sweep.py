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
import yaml

from commands import command_of, kill, trials_of, wait_gone
from dfkd_ray import bundles, config, results, sweep, trial
from dfkd_ray.cli.live import descendants

DATA = {
    "about": {"source": "a test", "command": "none", "cost": "seconds", "expected": "rows"},
    "base": {
        "bn_num_images": 16,
        "device": "cpu",
        "synthesis": {"num_steps": 10, "batch_size": 8, "num_threads": 1},
        "distillation": {
            "num_images": 16,
            "num_steps": 60,
            "batch_size": 8,
            "eval_every": 5,
            "checkpoint_every": 5,
            "num_threads": 1,
        },
        "reference": {"num_images": 16, "synthesis": {"batch_size": 8, "num_steps": 2, "num_threads": 1}},
    },
    "grid": {
        "synthesis.bn_weight": [0.2, 2.0],
        "pruning.sparsity": [0.5, 0.7, 0.9],
        "distillation.temperature": [2.0, 6.0],
    },
}


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """The deterministic columns, in an order of their own."""
    return rows[results.deterministic_columns()].sort_values("trial_id").reset_index(drop=True)


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`dfkd-ray` with some words, its output in a file."""
    with log.open("ab") as out:
        command = [sys.executable, "-m", "dfkd_ray", *words]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def rows_of(folder: Path) -> int:
    """Parts of the trials table."""
    return len(list((folder / "trials").glob("*.parquet")))


def disturbed(words: list[str], folder: Path, log: Path, plan: list[list[str]], rng: random.Random) -> list[str]:
    """A session for each list of `plan`: its targets are killed one after the other, at random moments while trials
    run. The last session of a plan that ends with `[]` is left alone. Returns what was killed."""
    killed = []
    for targets in plan:
        driver = start(words, log)
        for target in targets:
            wanted = rows_of(folder) + rng.choice([0, 1])
            while rows_of(folder) < wanted or not trials_of(driver.pid):
                assert driver.poll() is None, log.read_text()[-3000:]
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.7))
            own = descendants(driver.pid)
            if target == "trial":
                victims = trials_of(driver.pid)
                while not victims:
                    assert driver.poll() is None, log.read_text()[-3000:]
                    victims = trials_of(driver.pid)
                kill([rng.choice(victims)])
            else:
                kill([driver.pid] if target == "driver" else [driver.pid, *own])
                driver.wait()
                # Ray's two agents notice within a minute; what computes or writes is gone at once.
                left = wait_gone([pid for pid in own if b"Agent" not in command_of(pid)])
                assert not left, [command_of(pid)[:60] for pid in left]
            killed.append(target)
        code = driver.wait(timeout=900)
        assert code == (-signal.SIGKILL if set(targets) & {"driver", "everything"} else 0), log.read_text()[-3000:]
    return killed


@pytest.mark.timeout(2400)
def test_twelve_trials_killed_five_times_end_with_the_table_of_an_undisturbed_run(tiny_teacher, tmp_path):
    data = {**DATA, "base": {**DATA["base"], "teacher": str(tiny_teacher)}}
    (tmp_path / "twelve.yaml").write_text(yaml.safe_dump(data))
    folder, log = tmp_path / "killed", tmp_path / "log"
    words = ["sweep", str(tmp_path / "twelve.yaml"), "--results", str(folder), "--cache", str(tmp_path / "cache")]
    words += ["--test-data", "none", "--synthesizers", "1"]
    plan = [["trial", "driver"], ["trial", "trial", "everything"], []]
    killed = disturbed(words, folder, log, plan, random.Random(4))
    assert len(killed) == 5 and set(killed) == {"driver", "trial", "everything"}

    # Undisturbed: one process, one trial after the other, no Ray.
    jobs = sweep.plan(sweep.expand(config.validate(sweep.SweepConfig, data), {}), bundles.load)
    alone = tmp_path / "alone"
    for job in jobs:
        sweep.run_job(job, trial.made_here(tmp_path / "other cache"), None, None, alone, ())
    wanted = results.read(alone, "trials")
    assert len(wanted) == 12 and (wanted["status"] == "finished").all()

    pd.testing.assert_frame_equal(comparable(results.read(folder, "trials")), comparable(wanted))
    parts = [pq.read_table(part) for part in sorted((folder / "trials").glob("*.parquet"))]  # each is whole
    assert sum(part.num_rows for part in parts) == 12, "no row is doubled"
    pd.testing.assert_frame_equal(
        *(results.read(place, "synthesis")[results.deterministic_columns("synthesis")] for place in (folder, alone))
    )
    for job in jobs:
        names = [(place / "students" / job.id / "weights.safetensors").read_bytes() for place in (folder, alone)]
        assert names[0] == names[1]
    assert not list((folder / "checkpoints").glob("*")) and not list((folder / "students").glob(".*"))
    printed = log.read_text()
    assert "12 trials, 0 failed" in printed and "Traceback" not in printed
