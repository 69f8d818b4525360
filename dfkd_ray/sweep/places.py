"""Checks, locks and tidies the results folder; test-writes any folder; retries writes; `Stopped`."""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from filelock import FileLock, Timeout

from dfkd_ray import bundles, results, storage, targets, trial
from dfkd_ray.fleet.node_check import write_problem
from dfkd_ray.storage import Folder, Where, in_one_line

log = logging.getLogger(__name__)
SCHEMA = "dfkd_ray.results/1"
CLAIM = ".results.json"  # marks a folder as a results place before its first row exists
PLACE = targets.Product("a results place", {CLAIM: targets.claims(SCHEMA)}, results.is_place)
HALF_MADE = re.compile(r"\.t-[0-9a-f]{12}-[a-z0-9_]{8}")  # a student whose writer was killed
Result = TypeVar("Result")
PAUSES_S = (0.5, 2.0, 5.0)  # before the second, third and fourth try
PROBE_BYTES = 1 << 20
# Error numbers of the disk, as opposed to errors of one trial.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}


class Stopped(OSError):
    """The sweep has stopped because of Ray, the disk or the object store; all finished rows are safe."""


def probe(folder: Folder, what: str) -> None:
    """Write, read back and remove a megabyte. `OSError` (one line) if that fails or takes too long."""
    problem = write_problem(folder, PROBE_BYTES)
    if problem:
        raise OSError(f"the {what} {folder} cannot be written: {problem}; mend that or choose another place")


@contextmanager
def explained(folder: Folder, what: str) -> Iterator[None]:
    """Add the place and advice to an `OSError` of the body."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the {what} {folder} cannot be used: {in_one_line(error)}; mend that or choose another place"
        ) from error


def is_disk_error(error: BaseException) -> bool:
    """Whether an error, here or in another process's message, is one of disk or store that every trial would meet."""
    if not isinstance(error, OSError):
        return False
    number = re.search(r"\[Errno (\d+)\]", str(error))
    return (error.errno or (int(number[1]) if number else None)) in DISK_ERRORS


def persistently(action: Callable[[], Result], is_passing: Callable[[OSError], bool] = lambda _error: True) -> Result:
    """`action()`, retried up to three times after an `OSError` for which `is_passing`; then the error is raised."""
    for pause in PAUSES_S:
        try:
            return action()
        except OSError as error:
            if not is_passing(error):
                raise
            log.warning("trying again in %g s: %s", pause, error)
            time.sleep(pause)
    return action()


@contextmanager
def reserved(folder: Folder) -> Iterator[None]:
    """Hold a local folder's lock while open: `OSError` if another sweep on this machine runs in it."""
    if not folder.is_local:  # an object store has no locks
        yield
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another sweep is running in {folder}; wait for it, or choose another `results`") from None
    try:
        yield
    finally:
        lock.release()


def check_target(where: Where) -> Folder:
    """The folder, if a sweep may write its results there. `ValueError` if it holds other files."""
    folder = storage.folder(where)
    with explained(folder, "results folder"):
        return targets.check(folder, PLACE)


def tidy(folder: Folder, finished: Iterable[str]) -> None:
    """Remove leftovers of killed processes: incomplete students, and checkpoints of finished trials."""
    if not folder.is_local:
        return
    students = folder.path / "students"
    if students.is_dir() and not students.is_symlink():
        for half_made in students.iterdir():
            if HALF_MADE.fullmatch(half_made.name):
                Folder(str(half_made)).clear((bundles.DESCRIPTION, bundles.WEIGHTS).__contains__)
    trial.remove_checkpoints(folder, finished)
