"""Checks, locks and cleans results folder and cache before a sweep; retries failed writes; the exception `Stopped`."""

import errno
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dfkd_ray import bundles, results, storage, targets, trial
from dfkd_ray.storage import Folder, Where, in_one_line

log = logging.getLogger(__name__)
SCHEMA = "dfkd_ray.results/1"
CLAIM = ".results.json"  # marks a folder as a results place before its first row exists
PLACE = targets.Product("a results place", {CLAIM: targets.claims(SCHEMA)}, results.is_place)
HALF_MADE = re.compile(r"\.t-[0-9a-f]{12}-[a-z0-9_]{8}")  # a student whose writer was killed
Result = TypeVar("Result")
PAUSES_S = (0.5, 2.0, 5.0)  # before the second, third and fourth try
PROBE_BYTES = 1 << 20
NODE_PROBE_BYTES = 1 << 12  # many nodes may write at once
ANSWER_S = 60.0  # within which a store must accept a megabyte
# Error numbers of the disk, as opposed to errors of one trial.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}


class Stopped(OSError):
    """The sweep has stopped because of Ray, the disk or the object store; all finished rows are safe."""


def probe(folder: Folder, what: str) -> None:
    """Write, read back and remove a megabyte. `OSError` (one line) if that fails or takes too long."""
    problem = write_problem(folder, PROBE_BYTES)
    if problem:
        raise OSError(f"the {what} {folder} cannot be written: {problem}; mend that or choose another place")


def write_problem(folder: Folder, num_bytes: int) -> str | None:
    """Why `num_bytes` cannot be written, read back and removed; None if they can."""
    data, name = secrets.token_bytes(num_bytes), f".probe-{secrets.token_hex(4)}"
    problems: list[str] = []

    def attempt() -> None:
        try:
            folder.write(name, data)
            try:
                if folder.read(name) != data:
                    problems.append("what was written does not read back")
            finally:
                folder.remove(name)
        except OSError as error:
            problems.append(in_one_line(error))

    # The client of an unreachable bucket may retry for many minutes: the thread is abandoned.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if thread.is_alive():
        problems.append(f"no answer within {ANSWER_S:.0f} s")
    return problems[0] if problems else None


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


def try_on_every_node(place: Folder, cache: Folder | None) -> None:
    """Check results folder and cache on every node. `OSError` names a node that cannot use them.

    Nodes may have other credentials, mounts and disks than the driver. One task per node, all concurrent, looks for a
    file that the driver wrote in `place`, and test-writes both places. A single machine with local folders is skipped:
    the driver has tested them. With a URI even a single machine is tested: workers of a running cluster do not have
    the driver's environment.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2 and place.is_local and (cache is None or cache.is_local):
        return
    name = f".seen-{secrets.token_hex(4)}"
    place.write(name, name.encode())
    try:
        asked: list[tuple[str, Any]] = []
        for node in alive:
            on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look: Any = ray.remote(trouble_here)
            reference = look.options(num_cpus=0, scheduling_strategy=on_it).remote(place, name, cache)
            asked.append((node["NodeManagerHostname"], reference))
        for host, reference in asked:
            try:
                trouble = ray.get(reference, timeout=3 * ANSWER_S)
            except GetTimeoutError:
                continue  # busy node: its first trial would report the problem
            except RayError as error:
                raise OSError(f"node {host} cannot run trials: {in_one_line(error.__cause__ or error)}") from None
            if trouble:
                raise OSError(f"node {host}: {trouble}")
    finally:
        place.remove(name)


def trouble_here(place: Folder, name: str, cache: Folder | None) -> str | None:
    """The problem that this machine has with the two places, and advice; None if there is none."""
    access = "give this node the access that the sweep's own has (credentials, mounts), or choose another"
    try:
        if place.read(name) is None:
            return f"it does not see {place}; choose `results` in a folder that all machines share, or a URI"
    except OSError as error:
        return f"the results folder {place} cannot be read: {in_one_line(error)}; {access} `results`"
    for folder, what, option in ((place, "results folder", "`results`"), (cache, "cache", "`cache`")):
        problem = None if folder is None else write_problem(folder, NODE_PROBE_BYTES)
        if problem:
            return f"the {what} {folder} cannot be written: {problem}; {access} {option}"
    return None
