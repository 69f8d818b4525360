"""Runs a sweep's trials with Ray Tune, and reports each start, restart and end of a trial to the ledger."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from dfkd_ray import devices, scratch
from dfkd_ray.config import TrialConfig
from dfkd_ray.sweep import optuna
from dfkd_ray.sweep.jobs import Job, Plan
from dfkd_ray.sweep.ledger import RETRIES, Ledger
from dfkd_ray.sweep.search import StopConfig
from dfkd_ray.sweep.worker import Shared, in_worker


def drive(
    plan: Plan, asha: Any | None, shared: Shared, placement: Any, ledger: Ledger, stop: Callable[[], bool]
) -> None:
    """Run the ledger's jobs with Ray Tune. `shared` holds handles to fleet and board; `asha` stops trials early."""
    from ray import tune

    may_stop = asha is not None  # a bool, so that trials do not pickle the scheduler

    def over() -> bool:
        """Whether the sweep must stop."""
        return stop() or ledger.trouble is not None

    def fit(space: dict[str, Any], **asking: Any) -> None:
        """One run of Tune, with the callback `callback`."""
        points = [(job.id, job.config, job.teacher.hash) for job in ledger.todo]

        def trial(point: Mapping[str, Any]) -> None:
            if not placement.trial_gpus:
                devices.hide_gpus()  # a trial without a GPU reservation must not use a synthesizer's GPU
            if "config" in point:  # of a search
                config = TrialConfig.model_validate_json(point["config"])
                trial_id, teacher_hash = point["id"], point["teacher_hash"]
            else:
                trial_id, config, teacher_hash = points[point["job"]]
            tune.report(in_worker(trial_id, config, teacher_hash, shared, tune.report if may_stop else None))

        resources = {"cpu": placement.trial_cpus, "gpu": placement.trial_gpus}
        with scratch.folder("tune") as folder:
            tuner = tune.Tuner(
                tune.with_resources(trial, resources),
                param_space=space,
                tune_config=tune.TuneConfig(
                    scheduler=asha,
                    max_concurrent_trials=plan.max_concurrent,
                    reuse_actors=True,
                    trial_dirname_creator=lambda t: f"trial_{t.trial_id}",
                    **asking,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder),
                    verbose=0,
                    callbacks=[callback],
                    stop=_stopper(over),
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                ),
            )
            tuner.fit()

    # The caller handles Ctrl-C. The reason why a trial failed is in its row, not on the screen.
    for name, value in {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    callback = _callback(ledger, asha, plan.stop)
    if plan.search:
        fit({}, search_alg=optuna.searcher(plan.search, ledger.add), num_samples=ledger.total)
    else:
        fit({"job": tune.grid_search(list(range(len(ledger.todo))))})
    # Tune gives up at once on a trial whose reused process dies before the trial begins, as on a lost machine (a failed
    # reset of a pending trial: ray.tune's `_process_trial_failure`). Such trials have not begun: run them again here.
    for _ in range(RETRIES):
        if callback.lost and not over():
            again, callback.lost = callback.lost, []
            fit({"job": tune.grid_search(again)})
    if not over():
        for index in callback.lost:
            ledger.died(ledger.todo[index])


def _callback(ledger: Ledger, asha: Any | None = None, stop: StopConfig | None = None) -> Any:
    """A Tune callback that updates the ledger; `asha.cut` says which trials were stopped early."""
    from ray import tune

    class Updates(tune.Callback):
        """Reports state changes of trials to the ledger."""

        def __init__(self, ledger: Ledger):
            self.ledger = ledger
            self.lost: list[int] = []  # indices of jobs that Tune gave up with retries left

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its callbacks for its own resume, which is not used

        def job(self, trial: Any) -> Job:
            """The job that a Tune trial runs."""
            return self.ledger.todo[trial.config["job"]]

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """The trial has a process."""
            self.ledger.started(self.job(trial))

        def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """The trial gets a new process."""
            self.ledger.again(self.job(trial))

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """The trial has finished or was stopped."""
            report = trial.last_result or {}
            if asha and stop and trial.trial_id in asha.cut:
                self.ledger.cut(self.job(trial), report, stop)
            else:
                self.ledger.ended(self.job(trial), report)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """Tune has given up on the trial, with or without retries left."""
            if trial.num_failures <= RETRIES:
                self.lost.append(trial.config["job"])
                self.ledger.again(self.job(trial))
            else:
                self.ledger.died(self.job(trial))

    return Updates(ledger)


def _stopper(stop: Callable[[], bool]) -> Any:
    """A Tune stopper for the whole sweep."""
    from ray import tune

    class Stops(tune.Stopper):
        """Calls `stop` at every step of Tune's loop."""

        def __init__(self, stop: Callable[[], bool]):
            self.stop = stop

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            """Never stops a single trial."""
            return False

        def stop_all(self) -> bool:
            """Whether to stop all trials."""
            return self.stop()

    return Stops(stop)
