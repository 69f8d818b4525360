"""Runs a sweep's command line in sessions that are killed: `sessions(...)` for test_sweep_running.py."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from dfkd_ray.cli.live import descendants


def trials_of(pid: int) -> list[int]:
    """The processes below one that run a Tune trial now."""
    return [child for child in descendants(pid) if b"ImplicitFunc.train" in command_of(child)]


def command_of(pid: int) -> bytes:
    """The command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pids: list[int]) -> None:
    """SIGKILL to each."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_gone(pids: list[int], seconds: float = 600.0) -> list[int]:
    """Wait for processes to end; returns those that have not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(command_of(pid) for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if command_of(pid)]


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
