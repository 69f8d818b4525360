"""Sweeps: a file of trials, run through Ray Tune on images that are made once.

`jobs = sweep.plan(sweep.expand(file, {}), bundles.load)`, then `sweep.run(jobs, place, cache_root)`; what came of it:
`results.read(place, "trials")`.
"""

from dfkd_ray.sweep.files import About, Job, SweepConfig, expand, plan
from dfkd_ray.sweep.places import Stopped
from dfkd_ray.sweep.running import LOOK_S, Seconds, preflight, run, run_job

__all__ = [
    "LOOK_S",
    "About",
    "Job",
    "Seconds",
    "Stopped",
    "SweepConfig",
    "expand",
    "plan",
    "preflight",
    "run",
    "run_job",
]
