"""The Python API of sweeps: many trials on Ray Tune that share their synthetic images.

`parse` takes the fields of a sweep file as a dict. `prepare` checks everything, starts nothing and returns a plan.
`run` runs the plan:

>>> from dfkd_ray import bundles, results, sweep
>>> small = {"num_images": 16, "num_steps": 4, "batch_size": 8, "eval_every": 2}
>>> settings = sweep.parse({
...     "base": {
...         "teacher": "fashion_mnist_resnet8",
...         "bn_num_images": 16,
...         "synthesis": {"batch_size": 16, "num_steps": 2},
...         "distillation": small,
...         "reference": {"num_images": 16, "synthesis": {"batch_size": 16, "num_steps": 2}},
...     },
...     "grid": {"pruning.sparsity": [0.5, 0.9]},
... })
>>> plan = sweep.prepare(settings, bundles.load)
>>> sweep.run(plan, folder / "grid", cache_root=None)  # number of failed trials
0
>>> len(results.read(folder / "grid", "trials"))
2

A search has domains instead of values. With `stop`, trials far from their teacher end early (status `stopped`):

>>> settings = sweep.parse({
...     "base": settings.base,
...     "search": {
...         "space": {"pruning.sparsity": {"uniform": [0.5, 0.9]}, "distillation.temperature": [2.0, 4.0]},
...         "num_trials": 3,
...     },
...     "stop": {"asha": {"grace_looks": 1, "reduction_factor": 3}},
... })
>>> sweep.run(sweep.prepare(settings, bundles.load), folder / "search", cache_root=None)
0
>>> set(results.read(folder / "search", "trials")["status"]) <= {"finished", "stopped"}
True

`folder` is a `pathlib.Path`; a URI works too. Called again, both sweeps resume where they stopped.
"""

from dfkd_ray.sweep.checking import Checked, Finding, check, settings_in, without_ranges
from dfkd_ray.sweep.earlier_runs import rows_in
from dfkd_ray.sweep.expectations import Expectation
from dfkd_ray.sweep.jobs import About, Job, Plan, SweepConfig, expand, parse, plan, prepare
from dfkd_ray.sweep.machines import preflight
from dfkd_ray.sweep.places import Stopped, check_target, explained
from dfkd_ray.sweep.runner import LOOK_S, Callbacks, Cluster, Data, real_sources, run
from dfkd_ray.sweep.schema import json_schema
from dfkd_ray.sweep.search import AshaConfig, SearchConfig, StopConfig
from dfkd_ray.sweep.worker import Seconds, run_job

__all__ = [
    "LOOK_S",
    "About",
    "AshaConfig",
    "Callbacks",
    "Checked",
    "Cluster",
    "Data",
    "Expectation",
    "Finding",
    "Job",
    "Plan",
    "SearchConfig",
    "Seconds",
    "StopConfig",
    "Stopped",
    "SweepConfig",
    "check",
    "check_target",
    "expand",
    "explained",
    "json_schema",
    "parse",
    "plan",
    "preflight",
    "prepare",
    "real_sources",
    "rows_in",
    "run",
    "run_job",
    "settings_in",
    "without_ranges",
]
