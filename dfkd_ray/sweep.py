"""A sweep file → trials → Ray Tune on this machine → the `trials` table.

A sweep is `base` (a trial config), `grid` (dotted field → list of values; a list of such grids is their union),
`seeds` (a number: that many seeds of synthesis and distillation), `tiny` (a small override) and `about`. Everything is
validated before Ray starts. Trials with a finished row in the results folder are not run again.
"""

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from dfkd_ray import results
from dfkd_ray import trial as one_trial
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import STRICT, SYNTHESIS_CONFIGS, RealConfig, TrialConfig, validate, with_overrides
from dfkd_ray.images import save_class_grid

log = logging.getLogger(__name__)
OnRow = Callable[[Mapping[str, Any], int, int], None]
SEED_FIELDS = ("synthesis.seed", "distillation.seed")
# Ray prints boxes, hints and warnings about things that this module decides; read before Ray is imported.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class About(BaseModel):
    """What a reader wants to know before starting a sweep."""

    model_config = STRICT

    source: str
    command: str
    cost: str
    expected: str


class SweepConfig(BaseModel):
    """The contents of a sweep file."""

    model_config = STRICT

    about: About
    base: dict[str, Any] = Field(default_factory=dict, description="a trial config; what it leaves out has defaults")
    grid: dict[str, list[Any]] | list[dict[str, list[Any]]] = Field(description="dotted field → values; or several")
    seeds: int = Field(
        default=1, ge=1, description="seeds 0 … n - 1 of synthesis and distillation for every combination"
    )
    tiny: dict[str, Any] = Field(default_factory=dict, description="dotted field → value, for --tiny")


@dataclass(frozen=True)
class Job:
    """One trial of a sweep, with what it needs."""

    config: TrialConfig
    teacher: Teacher
    id: str


def expand(sweep: SweepConfig, overrides: Mapping[str, Any], *, tiny: bool = False) -> list[TrialConfig]:
    """Every trial config of a sweep, in order, each once. `ValueError` with all errors of all combinations at once.

    `overrides` (dotted) and `tiny` win over `base`; an override of a grid's own field is an error.
    """
    grids = sweep.grid if isinstance(sweep.grid, list) else [sweep.grid]
    fixed = {**(sweep.tiny if tiny else {}), **overrides}
    configs: dict[str, TrialConfig] = {}
    errors: dict[str, None] = {}
    for grid in grids:
        clash = sorted(set(grid) & set(overrides))
        if clash:
            raise ValueError(f"--set {clash[0]}: the sweep's grid varies this field; change the grid instead")
        axes = [[(name, value) for value in values] for name, values in grid.items()]
        for combination in itertools.product(*axes):
            for seed in range(sweep.seeds):
                point = dict(combination)
                if sweep.seeds > 1:
                    point |= dict.fromkeys(SEED_FIELDS, seed)
                try:
                    data = with_overrides(sweep.base, point)
                    extra = {k: v for k, v in fixed.items() if k not in point and applies(k, data)}
                    config = validate(TrialConfig, with_overrides(data, extra), "sweep")
                    configs.setdefault(config.model_dump_json(), config)
                except ValueError as error:
                    errors |= dict.fromkeys(str(error).splitlines())
    if errors:
        raise ValueError("\n".join(errors))
    return list(configs.values())


def applies(name: str, data: Mapping[str, Any]) -> bool:
    """Whether an override is meant for this combination: another synthesis method's fields are not."""
    parent, _, leaf = name.partition(".")
    if parent != "synthesis":
        return True
    own = SYNTHESIS_CONFIGS[dict(data.get("synthesis", {})).get("method", "deepinversion")].model_fields
    return leaf in own or not any(leaf in other.model_fields for other in SYNTHESIS_CONFIGS.values())


def plan(
    configs: Sequence[TrialConfig], open_teacher: Callable[[str], Teacher], trust_code: Sequence[str] = ()
) -> list[Job]:
    """Open every teacher once, name and check every trial. `ValueError` with all that cannot run."""
    teachers: dict[str, Teacher] = {}
    errors = []
    for name in dict.fromkeys(config.teacher for config in configs):
        try:
            teachers[name] = open_teacher(name)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    jobs = {}
    for config in configs:
        teacher = teachers[config.teacher]
        name = one_trial.trial_id(config, teacher)
        jobs.setdefault(name, Job(config, teacher, name))
        try:
            one_trial.check(config, teacher, trust_code)
        except ValueError as error:
            errors.append(f"{config.teacher}: {error}")
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    return list(jobs.values())


def run_job(
    job: Job,
    test: Sequence[Batch] | None,
    real: BatchSource | None,
    results_folder: Path,
    cache_folder: Path,
    trust_code: Sequence[str],
) -> dict[str, Any]:
    """Run one trial and write what it leaves: student, picture, row (last, so that a row means all is there)."""
    try:
        outcome = one_trial.run(
            job.config,
            job.teacher,
            test=test,
            real=real,
            cache_folder=cache_folder,
            checkpoint=results_folder / "checkpoints",
            trust_code=trust_code,
        )
        row = outcome.row
        if outcome.student is not None:
            outcome.save_student(results_folder / "students" / job.id)
            picture = results_folder / "images" / f"{row['synthesis_key'][:12]}.png"
            save_class_grid(picture, outcome.batches, job.teacher.info.num_classes, job.teacher.info.space)
    except Exception as error:
        log.exception("trial %s", job.id)
        row = one_trial.provenance(job.config, job.teacher)
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    results.write_trials(results_folder, [row], job.id)
    shutil.rmtree(results_folder / "checkpoints" / job.id, ignore_errors=True)  # its row is on disk: of no more use
    return row


def run(
    jobs: Sequence[Job],
    results_folder: Path,
    cache_folder: Path,
    *,
    test_of: Callable[[Teacher], Sequence[Batch] | None] = lambda _teacher: None,
    real_of: Callable[[Teacher, RealConfig], BatchSource] | None = None,
    on_row: OnRow | None = None,
    trust_code: Sequence[str] = (),
) -> int:
    """Run the trials that have no finished row yet, on this machine; returns how many failed.

    As many trials run side by side as there are cores for their `distillation.num_threads`. `test_of` gives a
    teacher's test batches or None, `real_of` the real images for trials with `synthesis.method=real`; without it such
    trials are refused (`ValueError`).
    """
    if real_of is None and any(isinstance(job.config.synthesis, RealConfig) for job in jobs):
        raise ValueError(
            "synthesis.method=real needs real images, which are used only when asked for: --real-data NAME"
        )
    done = finished_ids(results_folder)
    todo = [job for job in jobs if job.id not in done]
    if not todo:
        return 0
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import tune

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        cpus, gpus = ray.cluster_resources().get("CPU", 1), ray.cluster_resources().get("GPU", 0)
        threads = max(job.config.distillation.num_threads for job in todo)
        on_gpu = gpus and any(job.config.device != "cpu" for job in todo)
        resources = {"cpu": float(min(threads, cpus)), "gpu": 1.0 if on_gpu else 0.0}
        tests = {teacher.hash: test_of(teacher) for teacher in {job.teacher.hash: job.teacher for job in todo}.values()}
        reals = {}
        for job in todo:
            if isinstance(job.config.synthesis, RealConfig) and real_of is not None:
                reals[job.id] = real_of(job.teacher, job.config.synthesis)

        def trainable(
            point: Mapping[str, Any], todo: Sequence[Job], tests: Mapping[str, Any], reals: Mapping[str, Any]
        ) -> None:
            job = todo[point["job"]]
            test, real = tests[job.teacher.hash], reals.get(job.id)
            row = run_job(job, test, real, results_folder, cache_folder, trust_code)
            tune.report({"failed": int(row["status"] == "failed")})

        with tempfile.TemporaryDirectory(prefix="dfkd_ray-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(trainable, todo=todo, tests=tests, reals=reals), resources),
                param_space={"job": tune.grid_search(list(range(len(todo))))},
                tune_config=tune.TuneConfig(
                    reuse_actors=True,
                    trial_dirname_creator=lambda t: f"trial_{t.trial_id}",
                ),
                run_config=tune.RunConfig(
                    name="tune", storage_path=scratch, verbose=0, callbacks=[_rows_to(on_row, todo, results_folder)]
                ),
            )
            tuner.fit()
    finally:
        if started_here:
            ray.shutdown()
    rows = results.read_trials(results_folder)
    finished = set(rows[rows["status"] == "finished"]["trial_id"])
    return sum(job.id not in finished for job in todo)


def _rows_to(on_row: OnRow | None, todo: Sequence[Job], results_folder: Path) -> Any:
    """A Tune callback that hands each finished trial's row to `on_row`."""
    from ray import tune

    class Rows(tune.Callback):
        """Counts trials as they end."""

        num_done = 0

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """Read the row that the trial has written."""
            self.num_done += 1
            job = todo[trial.config["job"]]
            if on_row:
                rows = results.read_trials(results_folder)
                row = rows[rows["trial_id"] == job.id].iloc[0].to_dict()
                on_row(row, self.num_done, len(todo))

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """A trial whose process died wrote no row: write one that says so."""
            job = todo[trial.config["job"]]
            row = one_trial.provenance(job.config, job.teacher)
            row |= {"status": "failed", "reason": "the trial's process died (killed, or out of memory)"}
            results.write_trials(results_folder, [row], job.id)
            self.on_trial_complete(iteration, trials, trial, **info)

    return Rows()


def finished_ids(results_folder: Path) -> set[str]:
    """Trials with a finished row."""
    if not any((results_folder / "trials").glob("*.parquet")):
        return set()
    rows = results.read_trials(results_folder)
    return set(rows[rows["status"] == "finished"]["trial_id"])
