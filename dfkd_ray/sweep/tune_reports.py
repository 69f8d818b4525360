"""Builds the dicts a trial reports to Ray Tune, and an early-stopped trial's row. Sends nothing.

The metric is KL(teacher || student) on the reference set, to be minimised; nothing in a report is measured on test
data.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

from dfkd_ray import trial as one_trial
from dfkd_ray.distillation_state import State
from dfkd_ray.ladder import BEFORE
from dfkd_ray.sweep.search import Objective, StopConfig

METRIC, MODE = "reference_kl", "min"
WORST = 1e9  # of a failed trial
# Columns that a running trial reports, for its row in case it is stopped early.
SO_FAR = (
    "synthesis_key",
    "num_cached_batches",
    "synthesis_wall_s",
    "reference_wall_s",
    "reconstruction_wall_s",
    "num_images",
    "images_sha256",
    "image_confidence",
    "class_histogram",
    "image_bn",
    *(str(rung.agreement) for rung in BEFORE),
)


def final(row: Mapping[str, Any] | None, num_steps: int) -> dict[str, Any]:
    """The final report of a trial to Tune. A failed trial, or one without a row, gets `WORST`."""
    if row is None or row["status"] == "failed":
        return {"step": 0, METRIC: WORST, "failed": 1}
    sought = {name: row[name] for name in get_args(Objective) if row.get(name) is not None}
    return {"step": num_steps, **sought, METRIC: row[METRIC], "failed": 0}


def evaluation(row: Mapping[str, Any], state: State) -> dict[str, Any]:
    """The report to Tune at an evaluation on the reference set: the step, and the best value so far.

    It carries, as JSON, the columns of a row in case the trial is stopped here, and all evaluations so far.
    """
    so_far = {name: row[name] for name in SO_FAR if name in row}
    so_far |= {"agreement": state.best_agreement, "reference_kl": state.best_kl, "best_step": state.best_step}
    return {
        "step": state.step,
        METRIC: min(state.best_kl, WORST),
        "so_far": json.dumps(so_far),
        "looks": json.dumps(state.epochs),
    }


def may_stop(state: State, num_steps: int) -> bool:
    """Whether a trial may be stopped now: it has a candidate student (pruning is done) and is not at its last step."""
    return 0 < state.step < num_steps and state.best_agreement >= 0


def stopped_row(job: Any, report: Mapping[str, Any], stop: StopConfig) -> dict[str, Any]:
    """The row of a trial stopped after the `report`: its numbers so far, none of them from test data."""
    reason = (
        f"stopped early at step {report['step']}: reference KL {report[METRIC]:.4g} was not among the best "
        f"1/{stop.asha.reduction_factor:g} of the trials that came so far"
    )
    so_far = json.loads(report["so_far"])
    return one_trial.provenance(job.config, job.teacher) | {**so_far, "status": "stopped", "reason": reason}
