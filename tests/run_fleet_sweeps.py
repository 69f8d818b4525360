"""Sweeps for test_fleet_sweep.py, in a process of their own: `python run_fleet_sweeps.py TEACHER FOLDER`."""

import io
import json
import os
import random
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from commands import command_of, kill
from dfkd_ray import cli, fleet, results, sweep
from dfkd_ray.cli.live import descendants
from helpers import jobs_of, sweep_of_four, write_yaml

VICTIMS = ["synthesizer", "coordinator", "synthesizer"]


@contextmanager
def killing() -> Iterator[list[str]]:
    """While open, fleets that start lose the members in `VICTIMS`, one after the other; yields what was killed."""
    kills: list[str] = []
    real_start, rng = fleet.started, random.Random(0)

    @contextmanager
    def started(*arguments, **options):
        with real_start(*arguments, **options) as running:
            over = threading.Event()

            def killer() -> None:
                while not over.wait(0.1) and not (running.status() or {}).get("in_flight"):
                    pass  # while trials still start there is nothing to disturb
                while len(kills) < len(VICTIMS) and not over.wait(rng.uniform(0.1, 0.5)):
                    try:
                        actors = ray.get(running.coordinator.actors.remote(), timeout=5)
                        victim = VICTIMS[len(kills)]
                        ray.kill(
                            running.coordinator if victim == "coordinator" else rng.choice(actors), no_restart=False
                        )
                        kills.append(victim)
                    except RayError:
                        continue

            thread = threading.Thread(target=killer)
            thread.start()
            try:
                yield running
            finally:
                over.set()
                thread.join()

    fleet.started = started
    try:
        yield kills
    finally:
        fleet.started = real_start


def swept(jobs: Sequence[sweep.Job], place: Path, cache_root: Path, synthesizers: int | None) -> dict[str, Any]:
    """Run a sweep in which no trial fails; returns the last status of its fleet."""
    status: dict[str, Any] = {}
    cluster, callbacks = sweep.Cluster(synthesizers=synthesizers), sweep.Callbacks(on_status=status.update)
    failed = sweep.run(jobs, place, str(cache_root), cluster=cluster, callbacks=callbacks)
    assert failed == 0, results.read(place, "trials")["reason"].tolist()
    return status


def unshared(jobs: Sequence[sweep.Job], place: Path) -> int:
    """Run a sweep of three trials without a fleet, in which the process that has ended two of them, and would be given
    the third, dies (with its machine, it may be); returns how many were killed."""
    killed: list[int] = []

    def kill_those(row: Mapping[str, Any], num_done: int, total: int) -> None:
        if num_done == 2:
            pids = [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(b"ray::ImplicitFunc")]
            kill(pids)
            killed.extend(pids)

    cluster, callbacks = sweep.Cluster(synthesizers=0), sweep.Callbacks(on_row=kill_those)
    assert sweep.run(jobs, place, None, cluster=cluster, callbacks=callbacks) == 0
    return len(killed)


def refused(*words: str) -> tuple[Any, str]:
    """The exit code and the error of a command line."""
    sys.argv = ["dfkd-ray", *words]
    with redirect_stderr(io.StringIO()) as err:
        try:
            cli.main()
        except SystemExit as end:
            return end.code, err.getvalue()
    raise AssertionError("a command ends with its exit code")


def main(teacher: str, folder: Path) -> None:
    """On one CPU: a cold and a warm sweep, sweeps with kills, one without a fleet, and one that does not fit.

    What they told is in `told.json`.
    """
    data = sweep_of_four(teacher)
    jobs = jobs_of(data)
    told: dict[str, Any] = {}
    with fleet.connected(num_cpus=1, object_store_memory=100_000_000):
        told["cold"] = swept(jobs, folder / "cold", folder / "cache", None)
        told["warm"] = swept(jobs, folder / "warm", folder / "cache", 1)
        with killing() as told["kills"]:
            for attempt in range(10):  # a sweep this small may end before it has been disturbed so often
                if len(told["kills"]) < len(VICTIMS):
                    swept(jobs, folder / f"killed-{attempt}", folder / f"killed-cache-{attempt}", 2)
        told["died"] = unshared(jobs[:3], folder / "unshared")
        words = ["sweep", str(write_yaml(folder / "four.yaml", data)), "--results", str(folder / "refused")]
        told["refused"] = refused(*words, "--cache", str(folder / "cache"), "--synthesizers", "100000")
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
