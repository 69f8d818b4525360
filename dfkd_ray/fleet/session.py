"""Starts a private Ray session on this machine, or connects to a Ray cluster.

A local session ("our own") listens on loopback only, requires a token and keeps its files in a private folder. In both
cases workers import only from folders on the driver's path. Ray does none of this by default.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dfkd_ray import scratch
from dfkd_ray.fleet import authentication, watching
from dfkd_ray.fleet.placement import Node
from dfkd_ray.text import one_line

# Turns off Ray's messages about things that this package decides. Ray reads these before it starts its processes.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Synthesizers and trials share cores: threads that busy-wait would slow down the others.
    "OMP_WAIT_POLICY": "passive",
}
CONNECT_S = 5.0
SOCKET_BYTES = 107 if sys.platform == "linux" else 103  # the longest path of a socket
# The longest socket path below the folder for temporary files: our folder, Ray's session folder, the socket.
BELOW = "/dfkd_ray-ray-12345678/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SHORT = "/tmp"
FEW_FILES = 256  # with fewer open files Ray does not start, or dies in the middle of a sweep
FEW_BYTES = 10 << 20
SHOWN = 100  # characters of a message of Ray or a value of the user


class Importable(list[str]):
    """The folders that Ray puts first on each worker's path, restricted to those on the driver's own path.

    Ray always adds the working folder; a `torch.py` there would replace torch in every worker.
    """

    def extend(self, folders: Iterable[str]) -> None:
        """As `list.extend`, but only for folders on the driver's `sys.path`."""
        here = {os.path.realpath(folder) for folder in sys.path}
        super().extend(folder for folder in folders if os.path.realpath(folder) in here)


@contextmanager
def connected(
    address: str | None = None, *, on_lost: Callable[[str], None] | None = None, **options: Any
) -> Iterator[None]:
    """A quiet Ray session while open. An existing session of this process is used as it is.

    Otherwise it connects to the cluster at `address`: `HOST:PORT`, or `auto` for one on this machine; None reads
    RAY_ADDRESS. Without any address it starts a local session and shuts it down at the end. A local session has no
    dashboard, and a token of its own unless the user has set RAY_AUTH_MODE. `on_lost` is called in a thread of its own,
    with a one-line reason, when Ray's processes or the cluster's head are gone; a minute later Ray ends this process.
    `ValueError` for an invalid address or mode; `OSError` (one line) if Ray does not start or answer.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield
        return
    # "local" and not None: with None, Ray would connect to the last cluster that was started on this machine.
    chosen = address or os.environ.get("RAY_ADDRESS", "").strip() or "local"
    authentication.settle()
    scratch.remove_dead([tempfile.gettempdir(), os.environ.get("RAY_TMPDIR") or SHORT, SHORT])
    on_terminate = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        if chosen == "local":
            options = stack.enter_context(with_private_folders({"include_dashboard": False, **options}))
            stack.callback(ray.shutdown)
            start(options)
        else:
            stack.callback(ray.shutdown)
            join(chosen, "`address`" if address else "RAY_ADDRESS, in the environment,", options)
        if callable(on_terminate) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has replaced it
        stack.enter_context(watching.watched(on_lost, is_own=chosen == "local"))
        try:
            yield
        except RayTaskError:  # an error of the task, not of Ray
            raise
        except RayError as error:
            raise ConnectionError(f"Ray has failed ({shown(error)}); {watching.HOW_TO_GO_ON}") from error


def start(options: dict[str, Any]) -> None:
    """Start Ray on this machine. `OSError` (one line) gives the reason and advice."""
    authentication.use_own_token()
    folder = options["_temp_dir"]
    check_room(folder)
    try:
        with on_loopback():
            init("local", options)
    except Exception as error:  # noqa: BLE001 - Ray raises any type, plain `Exception` too
        raise OSError(
            f"Ray does not start on this machine ({shown(error)}); see that it has memory, open files and processes "
            f"(`ulimit -a`) and room in {shown(folder)} to spare, then run the same command again"
        ) from None


def join(address: str, source: str, options: dict[str, Any]) -> None:
    """Connect to a running cluster; an error is one line. `source`: the option or variable that gave the address."""
    host, colon, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16
    if "://" in address or (address != "auto" and not (host and colon and is_port)):
        what = "; that is where jobs are submitted, not where sweeps connect" if address.startswith("http") else ""
        unset = "" if source.startswith("--") else "; unset it to run on this machine alone"
        raise ValueError(
            f"{source} {shown(repr(address))}: expected HOST:PORT of a cluster's head, as in 10.0.0.1:6379, or auto"
            f"{what}{unset}"
        )
    where = "on this machine" if address == "auto" else f"at {shown(address)}"
    where += "" if source.startswith("--") else f" ({source.split(',')[0]})"
    advice = "run this on one of its machines, with RAY_AUTH_MODE=token if it wants one; `ray start --head` starts one"
    try:
        if address != "auto":
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        init(address, options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ConnectionError(f"no Ray cluster to be reached {where} ({shown(error)}); {advice}") from None


def init(address: str, options: dict[str, Any]) -> None:
    """`ray.init` without output. Workers import from this process's path, and a closed terminal does not end them."""
    from ray.job_config import JobConfig

    job = JobConfig()
    job._py_driver_sys_path = Importable()
    # Ray's processes inherit the blocked signal. They end with this process, which stops cleanly or runs under nohup.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, job_config=job, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def on_loopback() -> Iterator[None]:
    """While open, a session that is started listens on loopback only.

    Ray does this by itself on Windows and macOS, to avoid firewall prompts. `_node_ip_address` does not help:
    Ray replaces a loopback address by the machine's own.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def with_private_folders(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`options` with a private folder for the session's files, unless they name one. It is removed at the end.

    Socket paths are limited. If the path of the temporary folder is too long, the session's folder is below /tmp, and
    only spilled objects stay below the temporary folder.
    """
    if "_temp_dir" in options:
        yield options
        return
    with ExitStack() as stack:
        base, deep = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()), None
        if len(os.fsencode(base + BELOW)) > SOCKET_BYTES:
            base, deep = SHORT, base
        try:
            if deep is not None:
                spill = stack.enter_context(scratch.folder("spill", deep))
                options = {"object_spilling_directory": str(spill), **options}
            folder = stack.enter_context(scratch.folder("ray", base))
        except OSError as error:
            raise OSError(
                f"Ray's files cannot be kept in {shown(deep or base)} ({error.strerror or shown(error)}); "
                "set RAY_TMPDIR to a folder that can be written"
            ) from None
        yield options | {"_temp_dir": str(folder)}


def check_room(folder: str) -> None:
    """`OSError` if Ray would not start or would stop later: too few open files, or no disk space."""
    with suppress(ImportError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= most < FEW_FILES:
            raise OSError(
                f"Ray needs more than the {most} open files that a process may have here; allow some thousand "
                "(`ulimit -n 4096`), then run the same command again"
            )
    with suppress(AttributeError):
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        if free < FEW_BYTES:
            raise OSError(
                f"{shown(Path(folder).parent)} has {free / 1e6:.0f} MB free, too little for Ray's files; free some "
                "space, or set RAY_TMPDIR to another folder, then run the same command again"
            )


def nodes() -> list[Node]:
    """The machines of the Ray session that are alive now."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def shown(said: object) -> str:
    """What Ray or the user says, in one short line."""
    return one_line(str(said).rstrip(". \n"), SHOWN)
