"""Checks the results folder and the cache on every node. Imports neither torch nor Tune, which workers would load."""

import secrets
import threading
from typing import Any

from dfkd_ray.storage import Folder, in_one_line

NODE_PROBE_BYTES = 1 << 12  # many nodes may write at once
ANSWER_S = 60.0  # within which a store must accept a megabyte


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
