"""Sweeps for test_fleet_sweep.py, in a process of their own: `python run_fleet_sweeps.py WHAT TEACHER FOLDER`."""

import json
import os
import random
import sys
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from commands import command_of, kill
from dfkd_ray import fleet, results, sweep
from dfkd_ray.cli.live import descendants
from helpers import jobs_of, sweep_of_four


@contextmanager
def killing(num_kills: int, seed: int):
    """While open, every fleet that starts loses random members, so many times; yields what was killed."""
    kills: list[str] = []
    real_start, rng = fleet.started, random.Random(seed)

    @contextmanager
    def started(*arguments, **options):
        with real_start(*arguments, **options) as running:
            over = threading.Event()

            def killer() -> None:
                while not over.wait(0.1) and not (running.status() or {}).get("in_flight"):
                    pass  # while trials still start there is nothing to disturb
                while len(kills) < num_kills and not over.wait(rng.uniform(0.1, 0.5)):
                    try:
                        actors = ray.get(running.coordinator.actors.remote(), timeout=5)
                        victim = rng.choice([*actors, running.coordinator])
                        ray.kill(victim, no_restart=False)
                        kills.append("coordinator" if victim is running.coordinator else "synthesizer")
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


def same(teacher: str, folder: Path) -> None:
    """One synthesizer; three on its warm cache; three on a cold one, with at least ten kills."""
    jobs, statuses = jobs_of(sweep_of_four(teacher)), {}

    def run(name: str, cache_name: str, synthesizers: int) -> None:
        cache, told = str(folder / cache_name), lambda status: statuses.update({name: status})
        failed = sweep.run(
            jobs,
            folder / name,
            cache,
            cluster=sweep.Cluster(synthesizers=synthesizers),
            callbacks=sweep.Callbacks(on_status=told),
        )
        assert failed == 0, results.read(folder / name, "trials")["reason"].tolist()

    with fleet.connected(num_cpus=2, object_store_memory=200_000_000):
        run("one", "cold", 1)
        run("warm", "cold", 3)
        with killing(10, seed=0) as kills:
            for attempt in range(10):  # a sweep this small ends before it can be disturbed ten times
                if len(kills) < 10:
                    run(f"killed-{attempt}", f"killed-cache-{attempt}", 3)
    (folder / "told.json").write_text(json.dumps({"statuses": statuses, "kills": kills}))


def one_cpu(teacher: str, folder: Path) -> None:
    """On one CPU two trials of two syntheses through the fleet, then two of one synthesis without it."""
    jobs = jobs_of(sweep_of_four(teacher))
    with fleet.connected(num_cpus=1, object_store_memory=100_000_000):
        assert sweep.run(jobs[::3], folder / "shared", str(folder / "cache")) == 0
        assert sweep.run(jobs[:2], folder / "unshared", None, cluster=sweep.Cluster(synthesizers=0)) == 0


def between(teacher: str, folder: Path) -> None:
    """Processes that have ended a trial, and would be given the next one, die (with their machine, it may be)."""
    killed: list[int] = []

    def kill_those(row: Mapping[str, Any], num_done: int, total: int) -> None:
        if num_done < total:
            pids = [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(b"ray::ImplicitFunc")]
            kill(pids)
            killed.extend(pids)

    with fleet.connected(num_cpus=1, object_store_memory=100_000_000):
        failed = sweep.run(
            jobs_of(sweep_of_four(teacher))[:3],
            folder / "between",
            None,
            cluster=sweep.Cluster(synthesizers=0),
            callbacks=sweep.Callbacks(on_row=kill_those),
        )
    (folder / "told.json").write_text(json.dumps({"failed": failed, "killed": len(killed)}))


if __name__ == "__main__":
    {"same": same, "one_cpu": one_cpu, "between": between}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
