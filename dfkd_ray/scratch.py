"""Private temporary folders, each held by the process that made it: those of processes that died are removed later.

A folder is locked for as long as it is in use. The lock is the operating system's and ends with its process, however
that ends, so a folder whose lock is free belongs to nobody. Names, owner and lock have to fit before one is removed.
"""

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

KINDS = ("tune", "ray", "spill")
NAME = re.compile(rf"dfkd_ray-(?:{'|'.join(KINDS)})-[a-z0-9_]{{8}}")
LOCK = ".lock"
TRIES = 5
PAUSES_S = (0.0, 0.2, 1.0)


@contextmanager
def folder(kind: str, base: Path | str | None = None) -> Iterator[Path]:
    """A new folder of this process alone, in `base` (default: where temporary files go), removed at the end.

    `OSError` where none can be made.
    """
    assert kind in KINDS, kind
    path, lock = made(kind, Path(tempfile.gettempdir() if base is None else base))
    try:
        yield path
    finally:
        remove(path)
        lock.release()


def made(kind: str, base: Path) -> tuple[Path, BaseFileLock]:
    """A new folder and its lock, held."""
    for _ in range(TRIES):
        path = Path(tempfile.mkdtemp(prefix=f"dfkd_ray-{kind}-", dir=base))
        lock = FileLock(path / LOCK)
        # Between its making and its locking another process may have taken it for one of a dead process.
        with suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            if (path / LOCK).exists():
                return path, lock
            lock.release()
    raise OSError(f"{base}: no private folder can be made there")


def remove_dead(bases: Iterable[Path | str]) -> list[Path]:
    """Remove what processes of this user that are gone have left in `bases`; returns what was removed.

    Only folders (no links) of this user's with a name of ours and a free lock, or empty ones without a lock.
    """
    gone = []
    for base in {str(base) for base in bases}:
        with suppress(OSError), os.scandir(base) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and is_own_folder(entry) and remove_if_dead(Path(entry.path)):
                    gone.append(Path(entry.path))
    return gone


def is_own_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder, and this user's."""
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def remove_if_dead(path: Path) -> bool:
    """Remove a folder of ours unless a process holds it; whether it was removed."""
    try:
        kept = (path / LOCK).lstat()
    except OSError:
        with suppress(OSError):  # not empty: left by something else
            path.rmdir()
            return True
        return False
    if not stat.S_ISREG(kept.st_mode):
        return False
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    try:
        remove(path)
    finally:
        lock.release()
    return not path.exists()


def remove(path: Path) -> None:
    """Remove a folder, its lock last: what is left of one that is killed meanwhile is still known by it."""
    for pause_s in PAUSES_S:  # a process that is ending may still write into it
        with suppress(OSError):
            time.sleep(pause_s)
            for inner in (inner for inner in list(path.iterdir()) if inner.name != LOCK):
                if inner.is_dir() and not inner.is_symlink():
                    shutil.rmtree(inner, ignore_errors=True)
                else:
                    inner.unlink()
            if [inner.name for inner in path.iterdir()] in ([], [LOCK]):
                shutil.rmtree(path, ignore_errors=True)
                return
