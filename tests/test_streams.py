"""What is shown never decides what becomes of a command: pipes, terminals, disks, characters, errors, signals."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dfkd_ray import results
from dfkd_ray.config import with_overrides
from helpers import TINY_TRIAL, tiny_sweep, write_yaml
from table_rows import trial_row

LIMIT_S = 900.0  # for hangs


def environment(**more: str) -> dict[str, str]:
    """This process's, without what it knows of Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more


def run(command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `$CLI` is our command."""
    cli = f"{sys.executable} -m dfkd_ray"
    words = ["bash", "-c", command]
    options = {"capture_output": True, "text": True, "timeout": LIMIT_S, "check": False, "errors": "replace"}
    return subprocess.run(words, cwd=folder, env=environment(CLI=cli, **more), **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Results of so many trials that a pipe does not hold them."""
    folder = tmp_path_factory.mktemp("many")
    rows = [trial_row(n % 6, 0.5, n, trial_id=f"t-{n:012x}", teacher="réseau [b]") for n in range(400)]
    results.write(folder, "trials", rows, "part")
    return folder


# ---- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["results . --format csv", "results .", "schema", "--help"])
def test_a_reader_that_goes_away_ends_the_printing_in_silence_and_not_the_command(place, words):
    for reader in ("head -c 1 > /dev/null", "true"):
        done = run(f"$CLI {words} | {reader}; echo ${{PIPESTATUS[0]}}", place)
        assert (done.stdout, done.stderr) == ("0\n", "")


def test_an_error_whose_reader_has_gone_away_keeps_its_exit_code(place):
    done = run("{ $CLI results /nowhere; echo $? >&3; } 3>&1 2>&1 >/dev/null | true; $CLI results /nowhere 2>&-", place)
    assert done.returncode == 2
    assert run("exec 3>&1; { $CLI results /nowhere 2>&1; echo $? >&3; } | true", place).stdout == "2\n"


def test_characters_that_the_terminal_lacks_are_replaced(place):
    done = run("$CLI results . --limit 1", place, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "r?seau [b]" in done.stdout and done.stderr == ""
    done = run("$CLI results ./réseau", place, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    name = os.fsdecode(b"r\xe9seau")
    done = run(f"$CLI results './{name}' --out 'x.csv' || $CLI schema > /dev/null", place, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_full_disk_behind_standard_output_is_told_at_the_end(place):
    done = run("$CLI results . --format csv > /dev/full", place)
    assert done.returncode == 3
    assert done.stderr.startswith("error: standard output: No space left on device") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error_and_no_file_is_opened_in_their_place(place, tmp_path, closed):
    out = tmp_path / "rows.csv"
    done = run(f"$CLI results . --out {out} {closed}", place)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert out.read_text().startswith("trial_id,") and "written:" not in out.read_text()


class Refusing(io.RawIOBase):
    """A raw stream that refuses what it is told to."""

    def __init__(self, number: int):
        self.number, self.data = number, b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOSPC, errno.EFBIG])
def test_a_write_never_raises_and_trouble_but_for_a_reader_that_left_is_kept(monkeypatch, number):
    from dfkd_ray.cli import streams

    raw = Refusing(0)
    given = io.TextIOWrapper(io.BufferedWriter(raw), "ascii", line_buffering=True)
    monkeypatch.setattr(sys, "stdout", given)
    with streams.forgiving() as outlet:
        assert sys.stdout.encoding == "ascii" and not sys.stdout.isatty()
        sys.stdout.write("é \udce9 \u202e\n")
        raw.number = number
        sys.stdout.write("lost\n")
        sys.stdout.flush()
    assert sys.stdout is given and raw.data == b"? ? ?\n"
    assert (outlet.trouble is None) == (number in (errno.EPIPE, errno.EIO, errno.EBADF))


# ---- errors that nobody expected ----------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "dfkd_ray" / "errors"


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RecursionError(),
        MemoryError("no room"),
        AssertionError(),
        EOFError("ends"),
        RuntimeError("a\nb\x1b[31m s3://me:secret@bucket/x"),
        type("Panic", (BaseException,), {})("in a library"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_nobody_expected_is_one_line_and_its_traceback_is_in_a_file(
    run_cli, monkeypatch, place, state, error
):
    def read(*_arguments):
        raise error

    monkeypatch.setattr(results, "read", read)
    done = run_cli("results", str(place))
    assert done.code == 3 and len(done.err.splitlines()) == 1 and len(done.err) <= 301
    assert done.err.startswith(f"error: unexpected error: {type(error).__name__}")
    (file,) = state.iterdir()
    assert str(file) in done.err and "secret" not in done.err + file.read_text() and "\x1b" not in done.err
    text = file.read_text()
    assert "Traceback" in text and type(error).__name__ in text and "in read" in text
    assert file.stat().st_mode & 0o077 == 0
    debugged = run_cli("--debug", "results", str(place))
    assert debugged.code == 3 and "Traceback" in debugged.err and "in read" in debugged.err


def test_a_deep_recursion_ends_in_one_line(run_cli, monkeypatch, place, state):
    def read(*arguments):
        return read(*arguments)

    monkeypatch.setattr(results, "read", read)
    done = run_cli("results", str(place))
    assert done.code == 3 and len(done.err.splitlines()) == 1 and "unexpected error: RecursionError" in done.err


def test_tracebacks_are_few_and_a_state_folder_that_cannot_be_written_is_said(run_cli, monkeypatch, place, state):
    def read(*_arguments):
        raise KeyError("x")

    monkeypatch.setattr(results, "read", read)
    for _ in range(24):
        run_cli("results", str(place))
    assert len(list(state.iterdir())) == 20
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    done = run_cli("results", str(place))
    assert done.code == 3 and "could not be written" in done.err and len(done.err.splitlines()) == 1


def test_an_end_of_file_and_a_broken_pipe_inside_a_command_are_told(run_cli, monkeypatch, place, state):
    def read(*_arguments):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(results, "read", read)
    done = run_cli("results", str(place))
    assert (done.code, done.err) == (3, "error: Broken pipe\n")


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (ValueError(), 2, "error: ValueError"),
        (OSError(), 3, "error: OSError"),
        (SystemExit("a factory\x1b[2J has left"), 1, "error: a factory\\x1b[2J has left"),
        (SystemExit(None), 0, ""),
        (SystemExit(7), 7, ""),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ValueError("a\x1b[31mb\u202ec\u2028d\x9be"), 2, "error: a\\x1b[31mb\\u202ec\\u2028d\\x9be\n"),
        (ValueError("x" * 5000), 2, "error: xxx"),
        (ValueError("\n".join(f"line {n}" for n in range(1000))), 2, "error: line 0"),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, BaseException) else None,
)
def test_error_lines_are_short_few_and_plain(run_cli, monkeypatch, place, error, code, start):
    def read(*_arguments):
        raise error

    monkeypatch.setattr(results, "read", read)
    done = run_cli("results", str(place))
    lines = done.err.split("\n")[:-1]
    assert done.code == code and done.err.startswith(start) and bool(lines) == bool(start)
    assert all(len(line) <= 300 and line.isprintable() for line in lines) and len(lines) <= 41
    if "line 999" in str(error):
        assert lines[-1] == "error: and 960 more"


def test_a_thread_that_ends_in_an_error_leaves_a_line(place, state):
    program = (
        "import sys, threading\nfrom dfkd_ray import cli, results\n"
        "def read(*_):\n"
        "    thread = threading.Thread(target=lambda: {}['x'])\n    thread.start()\n    thread.join()\n"
        "    raise ValueError('no')\n"
        "results.read = read\nsys.argv = ['dfkd-ray', 'results', '.']\ncli.main()"
    )
    done = run(f'{sys.executable} -c "$PROGRAM"', place, PROGRAM=program, XDG_STATE_HOME=str(state.parent.parent))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("note: unexpected error beside the command: KeyError") and len(list(state.iterdir()))


# ---- signals -------------------------------------------------------------------------------------------------------


def started(words: list[str], folder: Path, log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Our command in a session of its own, its output in a file."""
    with log.open("wb") as out:
        command = [sys.executable, "-m", "dfkd_ray", *words]
        where: dict[str, Any] = {"stdout": out, "stderr": out, "cwd": folder, "env": environment()}
        process: subprocess.Popen[Any] = subprocess.Popen(command, start_new_session=True, **{**where, **options})
        return process


def wait_for(process: subprocess.Popen[bytes], is_there) -> None:
    """Until `is_there()`; a process that has ended before is an error."""
    end = time.monotonic() + LIMIT_S
    while not is_there():
        assert process.poll() is None and time.monotonic() < end, (process.returncode, process.args)
        time.sleep(0.02)


def test_an_interrupted_recovery_is_one_line_and_130(tiny_teacher, tmp_path):
    long = with_overrides(TINY_TRIAL, {"distillation.num_steps": 10**6, "distillation.eval_every": 10})
    write_yaml(tmp_path / "long.yaml", long)
    log, cache = tmp_path / "log", str(tmp_path / "cache")
    words = ["recover", str(tiny_teacher), "--config", "long.yaml", "--sparsity", "0.5", "--out", "out"]
    process = started([*words, "--test-data", "none", "--cache", cache], tmp_path, log)
    wait_for(process, lambda: "distilling" in log.read_text())
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(LIMIT_S) == 130
    said = log.read_text()
    assert said.count("error:") == 1 and said.splitlines()[-1].startswith("error: interrupted") and "Trace" not in said


def test_a_hangup_is_as_an_interrupt_and_one_that_is_ignored_stays_so(place):
    program = "import os, signal\nfrom dfkd_ray import results, cli\n"
    program += "read = results.read\n"
    program += "results.read = lambda *words: os.kill(os.getpid(), signal.SIGHUP) or read(*words)\n"
    program += "import sys; sys.argv = ['dfkd-ray', 'results', '.', '--limit', '1']; cli.main()"
    command = f'{sys.executable} -c "$PROGRAM" > /dev/null'
    done = run(command, place, PROGRAM=program)
    assert done.returncode == 130 and done.stderr.startswith("error: interrupted") and done.stderr.count("\n") == 1
    assert run(f"trap '' HUP; {command}", place, PROGRAM=program).returncode == 0


# ---- sweeps --------------------------------------------------------------------------------------------------------


def sweep_of(teacher: Path, folder: Path, sparsities: list[float], synthesizers: int, endless: bool) -> list[str]:
    """The words that sweep over these sparsities; perhaps with one more trial, which does not end by itself."""
    grid: list[dict[str, list[Any]]] = [{"pruning.sparsity": sparsities}]
    grid += [{"pruning.sparsity": [0.9], "distillation.num_steps": [10**6]}] if endless else []
    write_yaml(folder / "s.yaml", tiny_sweep(teacher, grid, **{"distillation.eval_every": 2}))
    words = ["sweep", "s.yaml", "--results", str(folder / "out"), "--cache", str(folder / "cache")]
    return [*words, "--synthesizers", str(synthesizers), "--test-data", "none"]


def statuses(folder: Path) -> list[str]:
    return results.read(folder / "out", "trials")["status"].tolist()


def rows_there(folder: Path) -> int:
    return len(list((folder / "out" / "trials").glob("*.parquet")))


def assert_interrupted(process: subprocess.Popen[bytes], log: Path) -> None:
    """It has ended with 130, and has said how to go on."""
    code, said = process.wait(LIMIT_S), log.read_text()
    assert code == 130, said
    assert "go on with: " in said and "Traceback" not in said and "Exception" not in said, said


@pytest.fixture(scope="module")
def unread(tiny_teacher, tmp_path_factory):
    """A sweep of a teacher whose name ASCII has not, on an ASCII terminal. Its reader goes away after the first line;
    when two trials have finished, Ctrl-C stops it in the third."""
    folder = tmp_path_factory.mktemp("unread") / "réseau [b]"
    folder.mkdir()
    teacher = folder / "net [b]é"
    teacher.symlink_to(tiny_teacher)
    words, log = sweep_of(teacher, folder, [0.3, 0.5], 1, endless=True), folder / "log"
    ascii_only = environment(PYTHONIOENCODING="ascii", LC_ALL="C")
    process = started(words, folder, log, stdout=subprocess.PIPE, env=ascii_only)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.stdout.close()
    wait_for(process, lambda: rows_there(folder) == 2)
    os.killpg(process.pid, signal.SIGINT)  # `tee` and Ray's processes hear Ctrl-C too
    assert_interrupted(process, log)
    return folder, teacher, first.decode("ascii")


def test_a_sweep_whose_reader_goes_away_finishes_its_trials_and_then_prints_for_nobody(unread):
    folder, teacher, _ = unread
    assert statuses(folder) == ["finished"] * 2
    words = " ".join(f"'{word}'" for word in sweep_of(teacher, folder, [0.3, 0.5], 1, endless=False))
    done = run(f"$CLI {words} | head -1; echo ${{PIPESTATUS[0]}}", folder)
    assert "2 trials, 2 already finished" in done.stdout and done.stdout.splitlines()[-1] == "0", done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_on_an_ascii_terminal_finishes_trials_of_a_teacher_with_another_name(unread):
    folder, _, first = unread
    assert statuses(folder) == ["finished"] * 2 and "r?seau [b]" in first


def test_a_sweep_that_is_interrupted_with_its_pipe_ends_with_130_and_says_how_to_go_on(unread):
    folder, _, _ = unread
    assert set(statuses(folder)) == {"finished"}


def test_a_sweep_whose_terminal_is_closed_ends_with_130_and_says_how_to_go_on(tiny_teacher, tmp_path):
    words, log = sweep_of(tiny_teacher, tmp_path, [0.3], 0, endless=True), tmp_path / "log"
    process = started(words, tmp_path, log)
    wait_for(process, lambda: rows_there(tmp_path) == 1)
    os.killpg(process.pid, signal.SIGHUP)  # as the kernel does
    assert_interrupted(process, log)
    assert set(statuses(tmp_path)) == {"finished"}
