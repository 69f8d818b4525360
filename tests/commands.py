"""The command line in processes of its own: tiny commands, and what they start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dfkd_ray.cli.live import descendants
from helpers import tiny_sweep, write_yaml

LIMIT_S = 900.0  # for hangs
SCRIPT = [str(Path(sys.executable).parent / "dfkd-ray")]
MODULE = [sys.executable, "-m", "dfkd_ray"]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what it knows of Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def done(words: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command that has ended, run in `folder`."""
    return subprocess.run(
        words, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def sweep_file(path: Path, teacher: str, **more: object) -> Path:
    """A sweep file with one tiny trial."""
    return write_yaml(path, tiny_sweep(teacher, {"pruning.sparsity": [0.5]}, **more))


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """An exit code, and one short line on standard error with some parts in it."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert all(part in lines[0] for part in parts), lines[0]


# ---- processes ------------------------------------------------------------------------------------------------------


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
