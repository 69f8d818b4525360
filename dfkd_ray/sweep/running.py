"""Jobs → Ray Tune → the tables `trials` and `synthesis`.

Trials read their images from one fleet (`dfkd_ray.fleet`): each distinct synthesis is paid for once. Trials with a
finished row in the results folder are not run again.
"""

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from dfkd_ray import results
from dfkd_ray import trial as one_trial
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import RealConfig, TrialConfig
from dfkd_ray.distillation import State
from dfkd_ray.images import save_class_grid
from dfkd_ray.sweep import tuning
from dfkd_ray.sweep.files import Job, Plan, job_of
from dfkd_ray.sweep.search import StopConfig

log = logging.getLogger(__name__)
DONE = ("finished", "stopped")  # statuses of rows that are final
OnRow = Callable[[Mapping[str, Any], int, int], None]
STATUS_S = 15.0
TEACHER_ACCURACIES: dict[tuple[Any, ...], float] = {}  # of this process; trials follow each other in one


def run_job(
    job: Job,
    images: one_trial.Images,
    test: Sequence[Batch] | None,
    real: BatchSource | None,
    results_folder: Path,
    trust_code: Sequence[str],
    on_look: one_trial.OnLook | None = None,
) -> dict[str, Any]:
    """Run one trial and write what it leaves: student, picture, rows (the trial's last: then all else is there)."""
    kd = job.config.distillation
    # The teacher is the same in every trial: one evaluation per process, not one per trial.
    known = (job.teacher.hash, kd.precision, kd.num_threads, job.config.device, None if test is None else len(test))
    try:
        outcome = one_trial.run(
            job.config,
            job.teacher,
            test=test,
            real=real,
            images=images,
            teacher_accuracy=TEACHER_ACCURACIES.get(known),
            checkpoint=results_folder / "checkpoints",
            on_look=on_look,
            trust_code=trust_code,
        )
        row = outcome.row
        if row.get("teacher_accuracy") is not None:
            TEACHER_ACCURACIES[known] = row["teacher_accuracy"]
        if outcome.student is not None:
            outcome.save_student(results_folder / "students" / job.id)
            results.write_synthesis(results_folder, outcome.synthesis)
            picture = results_folder / "images" / f"{row['synthesis_key'][:12]}.png"
            if not picture.exists():
                save_class_grid(picture, outcome.batches, job.teacher.info.num_classes, job.teacher.info.space)
    except Exception as error:
        log.exception("trial %s", job.id)
        row = one_trial.provenance(job.config, job.teacher)
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    row |= {"fleet_call_s": getattr(images, "call_s", None), "fleet_wait_s": getattr(images, "wait_s", None)}
    results.write_trials(results_folder, [row], job.id)
    shutil.rmtree(results_folder / "checkpoints" / job.id, ignore_errors=True)  # its row is on disk: of no more use
    return row


def run(
    jobs: Plan | Sequence[Job],
    results_folder: Path,
    cache_root: str | None,
    *,
    synthesizers: int | None = None,
    gpus_per_synthesizer: float | None = None,
    gpus_per_trial: float | None = None,
    batch_timeout_s: float = 3600.0,
    test_of: Callable[[Teacher], Sequence[Batch] | None] = lambda _teacher: None,
    real_of: Callable[[Teacher, RealConfig], BatchSource] | None = None,
    on_row: OnRow | None = None,
    on_status: Callable[[Mapping[str, Any]], None] | None = None,
    on_up: Callable[[], None] = lambda: None,
    trust_code: Sequence[str] = (),
) -> int:
    """Run the trials that have no finished row yet; returns how many failed.

    Takes a plan (of `prepare`), or just jobs. An Optuna search goes on from the rows that lie in its space; a trial
    that was stopped early has a row that says so, and is not run again.
    `cache_root` is a folder or URI; None keeps batches in memory only. `synthesizers` None takes as many as the
    machines have room for and grows with them; 0 shares nothing: every trial makes its own images. `test_of` gives a
    teacher's test batches or None, `real_of` the real images for trials with `synthesis.method=real`; without it such
    trials are refused. `on_up` is called when the fleet is up, `on_status` every few seconds with how it is.
    `ValueError` where nothing fits.
    """
    plan = jobs if isinstance(jobs, Plan) else Plan(list(jobs))
    if real_of is None and any(isinstance(job.config.synthesis, RealConfig) for job in plan.jobs):
        raise ValueError(
            "synthesis.method=real needs real images, which are used only when asked for: --real-data NAME"
        )
    rows = rows_in(results_folder)
    done = {row["trial_id"] for row in rows if row["status"] in DONE}
    todo = [job for job in plan.jobs if job.id not in done]
    num_left = plan.search.begin(rows) if plan.search else len(todo)
    if not num_left:
        return 0
    asha = tuning.scheduler(plan.stop, [job.config for job in plan.known_jobs]) if plan.stop else None
    if asha:
        own = plan.search.seen if plan.search else {job.id for job in plan.jobs}
        tuning.prime(asha, [look for look in looks_in(results_folder) if look[0] in own])
    # What has to be known of all trials beforehand is asked at the ends of the space, where Optuna chooses them.
    known = plan.known_jobs if plan.search else todo
    teachers = list({job.teacher.hash: job.teacher for job in known}.values())
    tests = {teacher.hash: test_of(teacher) for teacher in teachers}
    reals = {}
    for job in todo:
        if isinstance(job.config.synthesis, RealConfig) and real_of is not None:
            reals[job.id] = real_of(job.teacher, job.config.synthesis)
    from dfkd_ray import fleet

    with fleet.connected():
        settings, placement = preflight(known, cache_root, synthesizers, gpus_per_synthesizer, gpus_per_trial)
        settings = replace(settings, batch_timeout_s=batch_timeout_s)
        if synthesizers == 0:
            on_up()
            _tune(
                todo,
                None,
                placement,
                results_folder,
                cache_root,
                tests,
                reals,
                on_row,
                trust_code,
                plan,
                num_left,
                asha,
            )
        else:
            with fleet.started(settings, teachers) as running, told(running.status, on_status):
                on_up()
                _tune(
                    todo,
                    running,
                    placement,
                    results_folder,
                    cache_root,
                    tests,
                    reals,
                    on_row,
                    trust_code,
                    plan,
                    num_left,
                    asha,
                )
    done = finished_ids(results_folder)
    return sum(job.id not in done for job in todo)


def preflight(
    todo: Sequence[Job],
    cache_root: str | None,
    synthesizers: int | None,
    gpus_per_synthesizer: float | None,
    gpus_per_trial: float | None,
) -> tuple[Any, Any]:
    """Settings of the fleet and the placement of fleet and trials together; `ValueError` where nothing fits."""
    from dfkd_ray import fleet

    machines = fleet.nodes()
    use_gpu = any(node.gpus for node in machines) and any(job.config.device != "cpu" for job in todo)
    threads = max(getattr(job.config.synthesis, "num_threads", 1) for job in todo)
    placement = fleet.plan(
        machines,
        synthesizers=synthesizers or None,
        synthesizer_threads=threads,
        trial_threads=max(job.config.distillation.num_threads for job in todo),
        use_gpu=use_gpu,
        gpus_per_synthesizer=gpus_per_synthesizer,
        gpus_per_trial=gpus_per_trial,
    )
    settings = fleet.Settings(
        num_synthesizers=placement.num_synthesizers,
        cpus=placement.synthesizer_cpus,
        gpus=placement.synthesizer_gpus,
        cache_root=cache_root,
        device="auto" if use_gpu else "cpu",
        grow=synthesizers is None,
        threads=threads,
        trial_gpus=placement.trial_gpus,
        budget_bytes=fleet.budget_bytes(),
    )
    return settings, placement


@contextmanager
def told(
    status: Callable[[], Mapping[str, Any] | None], on_status: Callable[[Mapping[str, Any]], None] | None
) -> Iterator[None]:
    """While open, `on_status` hears of the fleet every few seconds, and once at the end."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(STATUS_S):
            tell()

    def tell() -> None:
        now = status()
        if now is not None and on_status is not None:
            on_status(now)

    thread = threading.Thread(target=watch, daemon=True)
    if on_status is not None:
        thread.start()
    try:
        yield
        tell()
    finally:
        over.set()
        if thread.is_alive():
            thread.join(timeout=STATUS_S)


def _tune(
    todo: list[Job],
    running: Any | None,
    placement: Any,
    results_folder: Path,
    cache_root: str | None,
    tests: Mapping[str, Any],
    reals: Mapping[str, Any],
    on_row: OnRow | None,
    trust_code: Sequence[str],
    plan: Plan,
    num_left: int,
    asha: Any | None,
) -> None:
    """The trials through Ray Tune; what they hold of the fleet is a handle.

    A search appends to `todo` the jobs that it comes up with, `num_left` of them; `asha` stops some early.
    """
    from ray import tune

    def trainable(
        point: Mapping[str, Any], todo: Sequence[Job], tests: Mapping[str, Any], reals: Mapping[str, Any]
    ) -> None:
        if "config" in point:  # of a search, whose teacher is one
            job = job_of(TrialConfig.model_validate_json(point["config"]), todo[0].teacher)
        else:
            job = todo[point["job"]]
        num_steps = job.config.distillation.num_steps

        def on_look(row: Mapping[str, Any], state: State) -> None:
            if tuning.counts(state, num_steps):
                tune.report(tuning.look(row, state))

        images = running.stream() if running else one_trial.made_here(cache_root)
        test, real = tests[job.teacher.hash], reals.get(job.id)
        row = run_job(job, images, test, real, results_folder, trust_code, on_look if stops else None)
        tune.report(tuning.result(row, num_steps))

    stops = asha is not None
    resources = {"cpu": placement.trial_cpus, "gpu": placement.trial_gpus}
    handed = plan.known_jobs if plan.search else todo
    if plan.search:
        points, options = {}, {"search_alg": tuning.searcher(plan.search, todo), "num_samples": num_left}
    else:
        points, options = {"job": tune.grid_search(list(range(len(todo))))}, {}
    with tempfile.TemporaryDirectory(prefix="dfkd_ray-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, todo=handed, tests=tests, reals=reals), resources),
            param_space=points,
            tune_config=tune.TuneConfig(
                scheduler=asha,
                max_concurrent_trials=plan.max_concurrent,
                reuse_actors=True,
                trial_dirname_creator=lambda t: f"trial_{t.trial_id}",
                **options,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[_rows_to(on_row, todo, results_folder, num_left, asha, plan.stop)],
            ),
        )
        tuner.fit()


def _rows_to(
    on_row: OnRow | None,
    todo: Sequence[Job],
    results_folder: Path,
    num_trials: int,
    asha: Any | None = None,
    stop: StopConfig | None = None,
) -> Any:
    """A Tune callback that hands each ended trial's row to `on_row`, and writes that of one that `asha` has stopped."""
    from ray import tune

    class Rows(tune.Callback):
        """Counts trials as they end."""

        num_done = 0

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """Read the row that the trial has written."""
            self.num_done += 1
            job = todo[trial.config["job"]]
            if asha and stop and trial.trial_id in asha.cut:
                row = tuning.stopped_row(job, trial.last_result, stop)
                results.write_trials(results_folder, [row], job.id)
                shutil.rmtree(results_folder / "checkpoints" / job.id, ignore_errors=True)
            if on_row:
                rows = results.read_trials(results_folder)
                row = rows[rows["trial_id"] == job.id].iloc[0].to_dict()
                on_row(row, self.num_done, num_trials)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """A trial whose process died wrote no row: write one that says so."""
            job = todo[trial.config["job"]]
            row = one_trial.provenance(job.config, job.teacher)
            row |= {"status": "failed", "reason": "the trial's process died (killed, or out of memory)"}
            results.write_trials(results_folder, [row], job.id)
            self.on_trial_complete(iteration, trials, trial, **info)

    return Rows()


def finished_ids(results_folder: Path) -> set[str]:
    """Trials with a row that is final: finished, or stopped early."""
    return {row["trial_id"] for row in rows_in(results_folder) if row["status"] in DONE}


def rows_in(results_folder: Path) -> list[dict[str, Any]]:
    """The rows of the `trials` table; none where there is no table yet."""
    if not any((results_folder / "trials").glob("*.parquet")):
        return []
    return [{str(k): v for k, v in row.items()} for row in results.read_trials(results_folder).to_dict("records")]


def looks_in(results_folder: Path) -> list[tuple[str, int, float]]:
    """(trial, step, best agreement so far) of the looks in the `epochs` table; none where there is no such table."""
    parts = sorted((results_folder / "epochs").glob("*.parquet"))
    best: dict[str, float] = {}
    looks = []
    frames = [pq.read_table(part, columns=["trial_id", "step", "agreement"]).to_pandas() for part in parts]
    for row in pd.concat(frames).sort_values(["trial_id", "step"]).to_dict("records") if frames else []:
        best[row["trial_id"]] = max(best.get(row["trial_id"], 0.0), row["agreement"])
        looks.append((row["trial_id"], int(row["step"]), best[row["trial_id"]]))
    return looks
