"""A sweep and a fleet on a cluster that begins as a head alone: `python run_elastic.py ADDRESS TEACHER FOLDER`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray

from dfkd_ray import fleet, sweep
from dfkd_ray.fleet.simulated import Simulated, simulated_spec
from helpers import jobs_of, tiny_sweep

LIMIT_S = 600.0


def machines() -> int:
    return sum(bool(node.cpus) for node in fleet.nodes())


def wait_until(there) -> bool:
    end = time.monotonic() + LIMIT_S
    while not there() and time.monotonic() < end:
        time.sleep(0.2)
    return there()


def main(address: str, teacher: str, folder: Path) -> dict:
    told: dict = {"refused": "", "statuses": []}
    with fleet.connected(address):
        told["at first"] = machines()
        jobs = jobs_of(tiny_sweep(teacher, {"pruning.sparsity": [0.5]}))
        try:
            sweep.run(jobs, folder / "refused", None, cluster=sweep.Cluster(synthesizers=1))
        except ValueError as error:
            told["refused"] = str(error)
        told["failed"] = sweep.run(
            jobs, folder / "results", str(folder / "cache"), cluster=sweep.Cluster(synthesizers=(1, 2))
        )

        # A fleet whose batches take a while, beside what has the rest of the first machine, as a trial does.
        class Trial:
            pass

        settings = fleet.Settings(
            num_synthesizers=1, cpus=0.05, most=2, added_cpus=0.95, idle_s=3.0, make=Simulated, device="cpu"
        )
        with fleet.started(settings, start_s=LIMIT_S) as running:
            actor = ray.remote(Trial)
            held: Any = actor.options(num_cpus=0.95).remote()  # Ray's types know no handle of a class without methods
            ray.get(held.__ray_ready__.remote(), timeout=LIMIT_S)
            spec = simulated_spec("elastic", (4, 1, 8, 8), (0.5, 0.5))
            status: dict[str, Any] = {}
            for batch, _ in running.stream(timeout_s=LIMIT_S).batches(spec, range(2000)):
                status = running.status() or {}
                if status.get("synthesizers_up") == 2 or batch.index == 1999:
                    break
            told["grown"] = (status["synthesizers_up"], machines())
            told["shrunk"] = wait_until(lambda: (running.status() or {}).get("synthesizers") == 1)
            told["first stays up"] = (running.status() or {}).get("synthesizers_up")
            ray.kill(held)
    with fleet.connected(address):  # as anybody: what the driver held is let go where it ends
        told["all gone"] = wait_until(lambda: machines() == 0)
    return told


if __name__ == "__main__":
    told = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    (Path(sys.argv[3]) / "told.json").write_text(json.dumps(told))
