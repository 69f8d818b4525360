"""Ray sessions: what is wrong is said in one line; a raylet or head that ends ends the sweep at once."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from glob import glob
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from commands import SCRIPT, assert_one_line, done, environment, sweep_file
from dfkd_ray import fleet
from dfkd_ray.cli.live import descendants
from dfkd_ray.fleet import session, watching

HANG_S = 280.0


@pytest.fixture
def no_ray(monkeypatch):
    """Ray is not to be started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_a, **_k: pytest.fail("Ray was started"))
    return monkeypatch


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "ray://h:10001", "h:99999", "h:0", "h:²", "h", ":1", "h:" + "9" * 5000]
)
def test_a_malformed_address_is_blamed_on_where_it_comes_from(no_ray, address):
    with pytest.raises(ValueError, match=r"^`address` .*expected HOST:PORT") as caught, fleet.connected(address):
        pass
    assert len(str(caught.value)) < 300
    no_ray.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS.*expected HOST:PORT.*unset it") as caught, fleet.connected():
        pass
    assert len(str(caught.value)) < 300 and "address" not in str(caught.value)


def test_a_cluster_that_is_gone_is_blamed_on_where_its_address_comes_from(no_ray):
    no_ray.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(OSError, match="RAY_ADDRESS") as caught, fleet.connected():
        pass
    assert "address" not in str(caught.value)


def test_an_empty_address_is_as_none(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", " ")
    asked = []
    monkeypatch.setattr("ray.init", lambda address, **_k: asked.append(address))
    with fleet.connected():
        pass
    assert asked == ["local"]


@pytest.mark.parametrize("error", [RuntimeError("timed out\nafter a while " * 100), Exception("no"), ValueError("x")])
def test_a_ray_that_does_not_start_is_an_environment_error_in_one_line(no_ray, error):
    def fails(*_a, **_k):
        raise error

    no_ray.setattr("ray.init", fails)
    with pytest.raises(OSError, match="Ray does not start on this machine") as caught, fleet.connected():
        pass
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_few_open_files_and_a_full_disk_are_told_before_ray_starts(no_ray, tmp_path):
    resource = pytest.importorskip("resource")
    with no_ray.context() as patch:
        patch.setattr(resource, "getrlimit", lambda _what: (64, 64))
        with pytest.raises(OSError, match=r"more than the 64 open files.*ulimit -n"), fleet.connected():
            pass
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, real.f_frsize, real.f_blocks, 0, 0, *tuple(real)[5:10]))
    no_ray.setattr(os, "statvfs", lambda _path: full)
    with pytest.raises(OSError, match=r"MB free.*RAY_TMPDIR"), fleet.connected():
        pass


def test_a_folder_that_cannot_be_written_is_told_with_what_to_do(no_ray, tmp_path):
    (tmp_path / "file").write_text("x")
    no_ray.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match="RAY_TMPDIR"), fleet.connected():
        pass


def test_where_the_temporary_folder_is_too_deep_for_sockets_only_what_is_large_goes_there(monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    with session.with_private_folders({}) as options:
        assert options["_temp_dir"].startswith("/tmp/dfkd_ray-ray-")
        assert options["object_spilling_directory"].startswith(str(deep))
        assert len(session.BELOW + session.SHORT) <= session.SOCKET_BYTES
    assert not Path(options["_temp_dir"]).exists() and not list(deep.iterdir())


def test_a_cluster_whose_head_does_not_answer_is_noticed_and_one_that_does_is_left_alone(monkeypatch):
    door = socket.create_server(("127.0.0.1", 0))

    def open_up():
        while True:
            try:
                door.accept()[0].close()
            except OSError:  # closed
                return

    threading.Thread(target=open_up, daemon=True).start()
    monkeypatch.setattr(watching, "ports", lambda: {"the head": door.getsockname()})
    monkeypatch.setattr(watching, "KNOCK_S", 0.1)
    monkeypatch.setattr(watching, "PATIENCE_S", 2.0)
    told: queue.Queue[str] = queue.Queue()
    with watching.watched(told.put, is_own=False):
        with pytest.raises(queue.Empty):
            told.get(timeout=3.0)
        door.shutdown(socket.SHUT_RDWR)
        door.close()
        line = told.get(timeout=HANG_S)
    assert line.startswith("the head (127.0.0.1:") and "the same command goes on" in line and "\n" not in line


def test_workers_import_from_where_the_driver_does(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "mine"), *sys.path])
    folders = session.Importable()
    folders.extend([str(tmp_path / "mine"), str(tmp_path / "working")])
    assert folders == [str(tmp_path / "mine")]


def below(pid: int) -> dict[str, int]:
    """Processes of a sweep by name; a running trial is `trial`."""
    found = {}
    for child in descendants(pid):
        try:
            found[Path(f"/proc/{child}/comm").read_text().strip()] = child
            if b"ImplicitFunc.train" in Path(f"/proc/{child}/cmdline").read_bytes():
                found["trial"] = child
        except OSError:  # it has ended meanwhile
            continue
    return found


def is_there(pid: int) -> bool:
    """Whether a process runs, and is no corpse."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def assert_killed_sweep_ends(name: str, words: list[str], folder: Path) -> int:
    """A sweep ends with one line, and with all that it has started, when that process of Ray's is; returns its id."""
    process = subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and "trial" not in below(process.pid):
            time.sleep(0.3)
        started = below(process.pid)
        os.kill(started[name], signal.SIGKILL)
        out, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert_one_line(subprocess.CompletedProcess(words, process.returncode, out, err), 3, name, "the same command")
    end = time.monotonic() + HANG_S
    while any(is_there(pid) for pid in started.values()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(is_there(pid) for pid in started.values())
    return process.pid


@pytest.mark.timeout(1800)
def test_a_sweep_whose_ray_is_killed_ends_with_one_line_and_can_go_on_also_with_a_long_path_for_temporary_files(
    tiny_teacher, tmp_path
):
    file = sweep_file(tmp_path / "long.yaml", str(tiny_teacher), **{"distillation.num_steps": 100_000})
    words = [*SCRIPT, "sweep", str(file), "--results", "out", "--cache", "cache", "--test-data", "none"]
    words += ["--synthesizers", "1"]
    killed = [assert_killed_sweep_ends(name, words, tmp_path) for name in ("raylet", "gcs_server")]
    # The next start removes what the dead ones have left, and goes on in the same place.
    sweep_file(file, str(tiny_teacher))
    (tmp_path / ("x" * 100)).mkdir()
    ended = done(words, tmp_path, TMPDIR=str(tmp_path / ("x" * 100)))
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    left = [Path(path).name for path in glob("/tmp/dfkd_ray-*/*")]  # Ray's sessions: each names its process
    assert not [name for name in left if any(str(pid) in name for pid in killed)]


def test_what_ray_itself_fails_with_is_an_error_of_the_environment_in_one_line(monkeypatch):
    monkeypatch.setattr(session, "start", lambda _options: None)
    said = r"Ray has failed .*the same command goes on from there"
    with pytest.raises(ConnectionError, match=said) as caught, session.connected():
        raise ActorDiedError()
    assert len(str(caught.value).splitlines()) == 1
