"""A thread in the driver that reports when the raylet or the head is gone, long before Ray's own calls fail.

In a session of our own it watches the two processes. Without the raylet, Ray calls hang for 15 seconds; without the
head (the GCS) they hang for a minute, and then Ray ends this process. On a cluster it probes the ports of the head and
of this machine's raylet.
"""

import importlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOOK_S = 0.05  # faster than Ray's own agent, which would print the raylet's log
KNOCK_S = 3.0
PATIENCE_S = 30.0  # a head with fault tolerance may be started again
HOW_TO_GO_ON = "what is finished is on disk: the same command goes on from there"


@contextmanager
def watched(on_lost: Callable[[str], None] | None, is_own: bool) -> Iterator[None]:
    """While open, call `on_lost` once, with a one-line reason, when the session has lost its raylet or its head."""
    if on_lost is None:
        yield
        return
    over = threading.Event()
    watch = until_ended if is_own and processes() else until_silent
    thread = threading.Thread(target=tell, args=(watch, over, on_lost), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=KNOCK_S + 1)


def tell(watch: Callable[[threading.Event], str | None], over: threading.Event, on_lost: Callable[[str], None]) -> None:
    """Run `watch`, and report its result unless the session is over."""
    lost = watch(over)
    if lost and not over.is_set():
        on_lost(f"{lost}; {HOW_TO_GO_ON}")


def processes() -> dict[str, Any]:
    """Name → process of a session of our own: raylet and GCS; empty if this version of Ray does not expose them."""
    node = getattr(importlib.import_module("ray._private.worker"), "_global_node", None)
    found = getattr(node, "all_processes", {})
    names = ("raylet", "gcs_server")
    return {name: info.process for name in names for info in found.get(name, []) if hasattr(info, "process")}


def until_ended(over: threading.Event) -> str | None:
    """Wait until one of our session's processes has ended; returns the reason."""
    there = processes()
    while not over.wait(LOOK_S):
        for name, process in there.items():
            if process.poll() is not None:
                return f"Ray has ended on this machine: its process {name} was killed, perhaps for want of memory"
    return None


def until_silent(over: threading.Event) -> str | None:
    """Wait until the cluster's head or this machine's raylet has not answered for `PATIENCE_S`; returns the reason."""
    doors = ports()
    heard = dict.fromkeys(doors, time.monotonic())
    while not over.wait(KNOCK_S):
        for what, (host, port) in doors.items():
            if answers(host, port):
                heard[what] = time.monotonic()
            elif time.monotonic() - heard[what] > PATIENCE_S:
                return f"{what} ({host}:{port}) has not answered for {PATIENCE_S:.0f} s"
    return None


def ports() -> dict[str, tuple[str, int]]:
    """Name → (host, port) of the head and of this machine's raylet."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    found = {"the head of the Ray cluster": (host.strip("[]"), int(port))}
    mine = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == mine:
            found["Ray on this machine"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    return found


def answers(host: str, port: int) -> bool:
    """Whether the port accepts a connection."""
    try:
        socket.create_connection((host, port), timeout=KNOCK_S).close()
    except OSError:
        return False
    return True
