"""Private temporary folders, locked by their process; folders of dead processes are removed later.

The lock is the operating system's and ends with the process, also after a kill. So a folder with a free lock is not in
use. It is removed only if name, owner and lock all match.
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
    """A new private folder in `base` (default: the folder for temporary files), removed at the end.

    `OSError` if it cannot be created.
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
        # Before it is locked, another process may take it for a dead process's folder and remove it.
        with suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            if (path / LOCK).exists():
                return path, lock
            lock.release()
    raise OSError(f"{base}: no private folder can be made there")


def remove_dead(bases: Iterable[Path | str]) -> list[Path]:
    """Remove the folders of this user's dead processes in `bases`; returns the removed paths.

    Removed are only real folders of this user with one of our names, if their lock is free or they are empty without a
    lock.
    """
    gone = []
    for base in {str(base) for base in bases}:
        with suppress(OSError), os.scandir(base) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and is_own_folder(entry) and remove_if_dead(Path(entry.path)):
                    gone.append(Path(entry.path))
    return gone


def is_own_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether the entry is a folder that this user owns."""
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def remove_if_dead(path: Path) -> bool:
    """Remove one of our folders unless a process holds its lock; returns whether it was removed."""
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
    """Remove a folder, its lock file last, so that the rest is still recognised if this process is killed meanwhile."""
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
