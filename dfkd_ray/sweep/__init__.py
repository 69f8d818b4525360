"""Sweeps: a file of trials, run through Ray Tune on images that are made once.

`jobs = sweep.plan(sweep.expand(file, {}), bundles.load)`, then `sweep.run(jobs, folder, cache_root)`.
"""

from dfkd_ray.sweep.files import About, Job, SweepConfig, expand, plan
from dfkd_ray.sweep.running import finished_ids, preflight, run, run_job

__all__ = ["About", "Job", "SweepConfig", "expand", "finished_ids", "plan", "preflight", "run", "run_job"]
