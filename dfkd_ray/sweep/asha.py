"""Builds Ray Tune's ASHA scheduler from `stop`, and gives it the evaluations of earlier runs.

Its rungs are never read from disk: they are rebuilt from the rows of the `epochs` table.
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from dfkd_ray.config import TrialConfig
from dfkd_ray.sweep.search import StopConfig
from dfkd_ray.sweep.tune_reports import METRIC, MODE


def scheduler(stop: StopConfig, configs: Sequence[TrialConfig]) -> Any:
    """Ray Tune's ASHA over distillation steps; `cut` holds the Tune ids of the trials that it has stopped."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Asha(ASHAScheduler):
        """ASHA that records which trials it has stopped, and never stops one that has ended."""

        def __init__(self):
            super().__init__(
                time_attr="step",
                metric=METRIC,
                mode=MODE,
                max_t=max(config.distillation.num_steps for config in configs),
                grace_period=stop.asha.grace_looks * configs[0].distillation.eval_every,
                reduction_factor=stop.asha.reduction_factor,
                stop_last_trials=False,
            )
            self.cut: set[str] = set()

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            """Tune's decision after a report; a trial's final report is only recorded."""
            decision = super().on_trial_result(tune_controller, trial, result)
            if "failed" in result:
                return TrialScheduler.CONTINUE
            if decision == TrialScheduler.STOP:
                self.cut.add(trial.trial_id)
            return decision

    return Asha()


def prime(asha: Any, looks: Iterable[tuple[str, int, float]]) -> None:
    """Give a new scheduler the (trial, step, best metric so far) of an earlier run, trials in any order."""
    trials: dict[str, Any] = {}
    for name, step, best in looks:
        if name not in trials:
            trials[name] = SimpleNamespace(trial_id=name)
            asha.on_trial_add(None, trials[name])
        asha.on_trial_result(None, trials[name], {"step": step, METRIC: best})
    asha.cut.clear()
