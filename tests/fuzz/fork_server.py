"""Runs command lines in forked children of a process that has imported everything once: a line of JSON for each.

    python fork_server.py WRITABLE

Where the system lets it (root on Linux), it first takes itself out of reach of the network and of every disk but the
folder WRITABLE: a fault that is looked for may remove what it should not. A command line that would start Ray ends
there, with exit code `STARTS_RAY`: all that is checked before has passed.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STARTS_RAY = 77
SHORT = "/var/tmp"  # Ray's sockets need a short path
CPU_S = 20  # of one input: beyond it hangs, however slow the machine is
IDLE_S = float(os.environ.get("FUZZ_IDLE_S", "90"))  # without any work done: it waits for what never comes
MEMORY_BYTES = 4 << 30  # of address space beyond the server's; what is held is measured and judged by the caller
FOREIGN_MODULES = ("torchvision", "ray.tune", "pyarrow.fs", "pyarrow.parquet", "rich.console", "scipy.io")
FOREIGN_MODULES += ("matplotlib.figure", "tensorboard", "yaml", "optuna", "rich.table", "rich._emoji_codes")
FOREIGN_MODULES += ("encodings.ascii", "shellingham")
NEW_NAMESPACES = 0x00020000 | 0x40000000  # CLONE_NEWNS, CLONE_NEWNET


def lock_up(writable: str) -> bool:
    """Take this process off the network, and make all but one folder read-only to it; says whether that worked."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACES) != 0:
        return False

    def mount(*words: str) -> bool:
        return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0

    if not (mount("--make-rprivate", "/") and mount("--bind", writable, writable)):
        return False
    points = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    for point in sorted(points - {writable}):
        mount("-o", "remount,bind,ro", point)
    for point in ("/dev/shm", SHORT):
        mount("-t", "tmpfs", "-o", "size=256m", "none", point)
    return not os.access("/", os.W_OK)


def import_all() -> None:
    """Everything that a command would import, before the first fork."""
    import PIL.Image
    import ray
    import torch

    import dfkd_ray

    own = (module.name for module in pkgutil.walk_packages(dfkd_ray.__path__, "dfkd_ray."))
    for name in (*FOREIGN_MODULES, *own, "oracles"):
        importlib.import_module(name)
    from dfkd_ray.sweep import estimate

    torch.set_num_threads(1)
    estimate.CAP_S = 0.2  # a dry run's timings

    def start(*_: Any, **__: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STARTS_RAY)

    ray.init = start
    PIL.Image.preinit()


def run(case: dict[str, Any]) -> None:
    """In the child: become what a shell would have started, and run the command line."""
    os.setsid()
    code = 1
    try:
        inside(case)
        module, _, name = case["by"].partition(":")
        main = getattr(importlib.import_module(module), name)
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter does with whatever reaches it
        traceback.print_exc()
    try:
        sys.stderr.flush()
        sys.stdout.flush()
    except (OSError, ValueError):
        code = 120  # as the interpreter does
    os._exit(code)


def inside(case: dict[str, Any]) -> None:
    """Folder, environment, streams and limits of a case."""
    import tempfile

    os.chdir(case["cwd"])
    os.environ.clear()
    os.environ.update(case["env"])
    tempfile.tempdir = None
    if os.path.ismount(SHORT):
        os.environ.setdefault("RAY_TMPDIR", SHORT)
    for number, name, flags in ((0, "/dev/null", os.O_RDONLY), (1, case["out"], None), (2, case["err"], None)):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if flags is None else flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=case["encoding"], closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, case["encoding"], "backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["dfkd-ray", *case["words"]]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    most = size + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def watch(pid: int) -> dict[str, Any]:
    """Wait for a child: its exit code or signal, seconds, and how much memory it held."""
    start = moved = time.monotonic()
    ticks, hangs = -1, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if int(now * 4) != int(moved * 4):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if (used := int(fields[11]) + int(fields[12])) != ticks:
                ticks, moved = used, now
        if now - moved > IDLE_S:
            hangs = True
            os.killpg(pid, signal.SIGKILL) if os.getpgid(pid) == pid else os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.002 if now - start < 2 else 0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it left running
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code,
        "hangs": hangs or code in (-signal.SIGXCPU, -signal.SIGKILL),
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - start,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def answer(told: dict[str, Any]) -> None:
    """Say it in a line."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def main(writable: str) -> None:
    """Answer a line for each case that comes in, until there are no more."""
    locked = lock_up(writable)
    import_all()
    gc.collect()
    gc.freeze()  # a child's collector leaves it alone, and so its pages shared
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    answer({"locked": locked, "held_bytes": held})
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(case)
        answer(watch(pid))


if __name__ == "__main__":
    main(sys.argv[1])
