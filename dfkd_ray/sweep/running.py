"""Jobs → Ray Tune → the tables `trials`, `epochs` and `synthesis`, and all else that a sweep leaves.

Trials read their images from one fleet (`dfkd_ray.fleet`): each distinct synthesis is paid for once. Trials with a
finished row in the results place are not run again.
"""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from dfkd_ray import results, storage, tensorboard
from dfkd_ray import trial as one_trial
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import RealConfig
from dfkd_ray.images import class_grid
from dfkd_ray.results import finished_ids
from dfkd_ray.storage import Folder, Where
from dfkd_ray.sweep.files import Job

log = logging.getLogger(__name__)
OnRow = Callable[[Mapping[str, Any], int, int], None]
STATUS_S = 15.0
COMPACT_EVERY = 200  # trials: more parts than that are slow to read
TEACHER_ACCURACIES: dict[tuple[Any, ...], float] = {}  # of this process; trials follow each other in one


def run_job(
    job: Job,
    images: one_trial.Images,
    test: Sequence[Batch] | None,
    real: BatchSource | None,
    place: Where,
    trust_code: Sequence[str],
) -> dict[str, Any]:
    """Run one trial and write what it leaves: student, picture, events, rows (its own last: then all else is there)."""
    place = storage.folder(place)
    kd = job.config.distillation

    def write_epochs(looks: Sequence[Mapping[str, float | int | None]]) -> None:
        results.write(place, "epochs", [{"trial_id": job.id, **look} for look in looks], job.id)
        tensorboard.write_epochs(place, job.id, looks)

    # The teacher is the same in every trial: one evaluation per process, not one per trial.
    known = (job.teacher.hash, kd.precision, kd.num_threads, job.config.device, None if test is None else len(test))
    epochs: Sequence[Mapping[str, Any]] = ()
    try:
        outcome = one_trial.run(
            job.config,
            job.teacher,
            test=test,
            real=real,
            images=images,
            teacher_accuracy=TEACHER_ACCURACIES.get(known),
            checkpoint=place / "checkpoints",
            on_epochs=write_epochs,
            trust_code=trust_code,
        )
        row, epochs = outcome.row, outcome.epochs
        if row.get("teacher_accuracy") is not None:
            TEACHER_ACCURACIES[known] = row["teacher_accuracy"]
        if outcome.student is not None:
            write_epochs(outcome.epochs)
            outcome.save_student(place / "students" / job.id)
            results.write_batches(place, outcome.synthesis)
            pictures, picture = place / "images", f"{row['synthesis_key'][:12]}.png"
            if picture not in pictures.names():
                info = job.teacher.info
                pictures.write(picture, class_grid(outcome.batches, info.num_classes, info.space))
    except Exception as error:
        log.exception("trial %s", job.id)
        row = one_trial.provenance(job.config, job.teacher)
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    row |= {"fleet_call_s": getattr(images, "call_s", None), "fleet_wait_s": getattr(images, "wait_s", None)}
    tensorboard.write_trial(place, row, epochs)
    results.write(place, "trials", [row], job.id)
    with suppress(OSError):
        (place / "checkpoints" / job.id).remove_all()  # its row is there: of no more use
    return row


def run(
    jobs: Sequence[Job],
    place: Where,
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

    `place`, a folder or URI, takes all results. `cache_root` is one too; None keeps batches in memory only.
    `synthesizers` None takes as many as the machines have room for and grows with them; 0 shares nothing: every trial
    makes its own images. `test_of` gives a teacher's test batches or None, `real_of` the real images for trials with
    `synthesis.method=real`; without it such trials are refused. `on_up` is called when the fleet is up, `on_status`
    every few seconds with how it is. `ValueError` where nothing fits.
    """
    if real_of is None and any(isinstance(job.config.synthesis, RealConfig) for job in jobs):
        raise ValueError(
            "synthesis.method=real needs real images, which are used only when asked for: --real-data NAME"
        )
    place = storage.folder(place)
    done = finished_ids(place)
    todo = [job for job in jobs if job.id not in done]
    if not todo:
        return 0
    teachers = list({job.teacher.hash: job.teacher for job in todo}.values())
    tests = {teacher.hash: test_of(teacher) for teacher in teachers}
    reals = {}
    for job in todo:
        if isinstance(job.config.synthesis, RealConfig) and real_of is not None:
            reals[job.id] = real_of(job.teacher, job.config.synthesis)
    from dfkd_ray import fleet

    tensorboard.write_sweep(place, [job.config for job in jobs])
    with fleet.connected():
        settings, placement = preflight(todo, cache_root, synthesizers, gpus_per_synthesizer, gpus_per_trial)
        settings = replace(settings, batch_timeout_s=batch_timeout_s)
        if synthesizers == 0:
            on_up()
            _tune(todo, None, placement, place, cache_root, tests, reals, on_row, trust_code)
        else:
            with fleet.started(settings, teachers) as running, told(running.status, on_status):
                on_up()
                _tune(todo, running, placement, place, cache_root, tests, reals, on_row, trust_code)
    compact(place)
    finished = finished_ids(place)
    return sum(job.id not in finished for job in todo)


def compact(place: Folder) -> None:
    """Make few files of the parts; where that fails the rows are as safe as before, and the next sweep tries again."""
    try:
        results.compact(place)
    except (OSError, ValueError) as error:
        log.warning("%s: its tables stay in many small files: %s", place, error)


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
    todo: Sequence[Job],
    running: Any | None,
    placement: Any,
    place: Folder,
    cache_root: str | None,
    tests: Mapping[str, Any],
    reals: Mapping[str, Any],
    on_row: OnRow | None,
    trust_code: Sequence[str],
) -> None:
    """The trials through Ray Tune; what they hold of the fleet is a handle."""
    from ray import tune

    def trainable(
        point: Mapping[str, Any], todo: Sequence[Job], tests: Mapping[str, Any], reals: Mapping[str, Any]
    ) -> None:
        job = todo[point["job"]]
        images = running.stream() if running else one_trial.made_here(cache_root)
        row = run_job(job, images, tests[job.teacher.hash], reals.get(job.id), place, trust_code)
        tune.report({"failed": int(row["status"] == "failed")})

    resources = {"cpu": placement.trial_cpus, "gpu": placement.trial_gpus}
    with tempfile.TemporaryDirectory(prefix="dfkd_ray-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, todo=todo, tests=tests, reals=reals), resources),
            param_space={"job": tune.grid_search(list(range(len(todo))))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                trial_dirname_creator=lambda t: f"trial_{t.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=scratch, verbose=0, callbacks=[_rows_to(on_row, todo, place)]
            ),
        )
        tuner.fit()


def _rows_to(on_row: OnRow | None, todo: Sequence[Job], place: Folder) -> Any:
    """A Tune callback that hands each finished trial's row to `on_row`, and compacts the tables now and then."""
    from ray import tune

    class Rows(tune.Callback):
        """Counts trials as they end."""

        num_done = 0

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """Read the row that the trial has written."""
            self.num_done += 1
            rows = results.read_part(place, "trials", todo[trial.config["job"]].id) if on_row else None
            if on_row and rows is not None:
                on_row(rows.iloc[0].to_dict(), self.num_done, len(todo))
            if self.num_done % COMPACT_EVERY == 0:
                compact(place)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """A trial whose process died wrote no row, as a rule: write one that says so."""
            job = todo[trial.config["job"]]
            there = results.read_part(place, "trials", job.id)
            if there is None or there["status"].iloc[0] != "finished":
                row = one_trial.provenance(job.config, job.teacher)
                row |= {"status": "failed", "reason": "the trial's process died (killed, or out of memory)"}
                results.write(place, "trials", [row], job.id)
            self.on_trial_complete(iteration, trials, trial, **info)

    return Rows()
