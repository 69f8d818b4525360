"""Runs one trial and writes its results: `in_worker` in a Ray Tune process (for tuner.py), `run_job` anywhere."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dfkd_ray import bundles, cache, evaluation, models, results, storage, tensorboard
from dfkd_ray import trial as one_trial
from dfkd_ray.bundles import Teacher, starts
from dfkd_ray.config import TrialConfig
from dfkd_ray.distillation_state import State
from dfkd_ray.images import class_grid
from dfkd_ray.results import FINAL
from dfkd_ray.results.finals import final_row
from dfkd_ray.storage import Folder, Where
from dfkd_ray.sweep import places, tune_reports
from dfkd_ray.sweep.jobs import Job

log = logging.getLogger(__name__)
TOLD_S = 1.0  # least time between two progress messages of one stage
TEACHER_ACCURACIES: dict[tuple[Any, ...], float] = {}  # cache of this process, which runs many trials in turn
OPENED: dict[str, Teacher] = {}  # cache of this process, by teacher hash


class Seconds(dict[str, float]):
    """Wall seconds by activity."""

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Count the block's wall time under `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({what: time.perf_counter() - start})

    def add(self, more: Mapping[str, float]) -> None:
        """Add the seconds of another counter."""
        for what, seconds in more.items():
            self[what] = self.get(what, 0.0) + seconds


def run_job(
    job: Job,
    inputs: one_trial.Inputs,
    place: Where,
    *,
    observer: one_trial.Observer = one_trial.NOBODY,
    seconds: Seconds | None = None,
) -> dict[str, Any]:
    """Run one trial and write its student, picture, TensorBoard events and rows; the trial's own row is written last.

    An error gives a row with status `failed`. An error of the disk or object store is retried after pauses instead,
    and raised as `OSError` if it persists. `seconds` is updated.
    """
    place, seconds = storage.folder(place), Seconds() if seconds is None else seconds
    kd, test = job.config.distillation, inputs.test

    def write_epochs(looks: Sequence[Mapping[str, float | int | None]]) -> None:
        with seconds.spent("results"):
            results.write(place, "epochs", epoch_rows(job.id, looks), job.id)
        with seconds.spent("TensorBoard"), for_show("TensorBoard"):
            tensorboard.write_epochs(place, job.id, looks)

    # The teacher is the same in every trial: one evaluation per process, not one per trial.
    tested = evaluation.test_set(test)["sha256"] if test else None
    known = (job.teacher.hash, kd.precision, kd.num_threads, job.config.device, tested)

    def attempt() -> one_trial.Outcome:
        unfit = results.unfit(one_trial.provenance(job.config, job.teacher))
        if unfit:  # refuse now, before anything is computed
            return one_trial.Outcome(failed_row(job, unfit))
        return one_trial.run(
            job.config,
            job.teacher,
            replace(inputs, teacher_accuracy=TEACHER_ACCURACIES.get(known)),
            checkpoint=place / one_trial.CHECKPOINTS,
            observer=replace(observer, epochs=write_epochs),
        )

    try:
        # A checkpoint that cannot be written ends the attempt; the next attempt resumes from the previous checkpoint.
        outcome = places.persistently(attempt, places.is_disk_error)
    except Exception as error:
        if places.is_disk_error(error):
            raise
        log.exception("trial %s", job.id)
        outcome = one_trial.Outcome(failed_row(job, one_trial.reason_of(error)))
    row = outcome.row
    for name in ("call_s", "wait_s"):
        row[f"fleet_{name}"] = getattr(inputs.images, name, None)
    if row.get("teacher_accuracy") is not None:
        TEACHER_ACCURACIES[known] = row["teacher_accuracy"]
    try:
        return places.persistently(lambda: keep(job, outcome, place, seconds))
    except OSError:
        raise
    except Exception as error:
        log.exception("trial %s", job.id)
        failed = failed_row(job, f"what it leaves cannot be written: {one_trial.reason_of(error)}")
        return places.persistently(lambda: keep(job, one_trial.Outcome(failed), place, seconds))


def epoch_rows(trial_id: str, looks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A trial's evaluations on the reference set as rows of `epochs`."""
    return [results.writable("epochs", {"trial_id": trial_id, **look}) for look in looks]


@contextmanager
def for_show(what: str) -> Iterator[None]:
    """Log and suppress exceptions of a display such as TensorBoard; only `OSError` (disk, object store) is raised."""
    try:
        yield
    except OSError:
        raise
    except Exception:
        log.exception("%s", what)


def keep(job: Job, outcome: one_trial.Outcome, place: Folder, seconds: Seconds) -> dict[str, Any]:
    """Write all results of a trial, each file atomically; idempotent. Returns the row that is in the table.

    That row differs from the outcome's in two cases. If an earlier attempt has written a final row and this one did not
    finish, the earlier row stays. If the table cannot hold the measured values, the row becomes a failed one.
    """
    row = results.kept(outcome.row)
    if row["status"] == "failed" and outcome.student is not None:
        outcome = one_trial.Outcome(row, epochs=outcome.epochs)
    if row["status"] != "finished":
        with seconds.spent("results"):
            final = final_row(place, job.id)
        if final is not None:
            return final
    with seconds.spent("results"):
        if outcome.epochs:
            results.write(place, "epochs", epoch_rows(job.id, outcome.epochs), job.id)
        if outcome.student is not None:
            outcome.save_student(place / "students" / job.id)
            results.write_batches(place, [results.writable("synthesis", row) for row in outcome.synthesis])
            pictures, picture = place / "images", f"{row['synthesis_key'][:12]}.png"
            if picture not in pictures.names():
                info = job.teacher.info
                pictures.write(picture, class_grid(outcome.batches, info.num_classes, info.space))
    with seconds.spent("TensorBoard"), for_show("TensorBoard"):
        tensorboard.write_trial(place, row, outcome.epochs)
    with seconds.spent("results"):
        results.write(place, "trials", [row], job.id)
        if row["status"] in FINAL:  # a failed trial keeps its checkpoints: it resumes from them
            with suppress(OSError):
                one_trial.remove_checkpoints(place, [job.id])
    return row


def failed_row(job: Job, reason: str) -> dict[str, Any]:
    """The row of a trial that failed for this reason."""
    return one_trial.provenance(job.config, job.teacher) | {"status": "failed", "reason": reason}


@dataclass(frozen=True)
class Shared:
    """Inputs shared by all trials of a sweep. It pickles small: large values are object references, in lists of one."""

    place: str
    cache_root: str | None
    trust_code: tuple[str, ...]
    fleet: Any | None
    board: Any | None
    teachers: Mapping[str, list[Any]]  # by hash, as `bundles.to_arrays`
    tests: Mapping[str, list[Any]]  # by the teacher's hash
    reals: Mapping[str, list[Any]]  # by trial id
    code: str | None = None  # the driver's `models.code_folder`
    students: Mapping[str, list[Any]] = field(default_factory=dict)  # by hash, as `starts.to_arrays`


def in_worker(
    trial_id: str,
    config: TrialConfig,
    teacher_hash: str,
    shared: Shared,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a trial in this process; returns its final report to Tune, with one of three keys.

    `row`: the trial's row, written here. `reason`: why there is no row; the driver writes a failed one. `stopped`: an
    error of disk or object store that every other trial would meet too. `report`, for trials that may be stopped early,
    is called at each evaluation on the reference set.
    """
    import ray

    seconds, num_steps = Seconds(), config.distillation.num_steps
    with suppress(OSError):  # an earlier attempt may have died after writing its row
        final = final_row(shared.place, trial_id, merged=False)
        if final is not None:
            return tune_reports.final(final, num_steps) | {"row": json.dumps(final), "seconds": dict(seconds)}
    try:
        if teacher_hash not in OPENED:
            OPENED[teacher_hash] = bundles.from_arrays(ray.get(shared.teachers[teacher_hash][0]))
        wanted = config.student.weights_sha256
        if wanted is not None and wanted in shared.students and wanted not in starts.HELD:
            starts.hold(starts.from_arrays(ray.get(shared.students[wanted][0])))
        job = Job(config, OPENED[teacher_hash], trial_id)
        test: Any = ray.get(shared.tests[teacher_hash][0])
        real: Any = ray.get(shared.reals[trial_id][0]) if trial_id in shared.reals else None
        images = shared.fleet.stream() if shared.fleet else one_trial.Local(shared.cache_root)
        inputs = one_trial.Inputs(test, real, images, trust_code=shared.trust_code)
    except Exception as error:
        log.exception("trial %s", trial_id)
        return tune_reports.final(None, num_steps) | {"reason": one_trial.reason_of(error)}
    progress = Telling(shared.board, trial_id, seconds) if shared.board else None

    def on_look(row: Mapping[str, Any], state: State) -> None:
        if report is not None and tune_reports.may_stop(state, num_steps):
            report(tune_reports.evaluation(row, state) | {"seconds": dict(seconds)})

    try:
        with models.code_from(shared.code):
            observer = one_trial.Observer(progress, on_look if report else None)
            row = run_job(job, inputs, shared.place, observer=observer, seconds=seconds)
    except OSError as error:
        log.exception("trial %s", trial_id)
        return tune_reports.final(None, num_steps) | {"stopped": why_stopped(error, storage.folder(shared.place))}
    except Exception as error:
        log.exception("trial %s", trial_id)
        return tune_reports.final(None, num_steps) | {"reason": one_trial.reason_of(error)}
    return tune_reports.final(row, num_steps) | {"row": json.dumps(row), "seconds": dict(seconds)}


def why_stopped(error: OSError, place: Folder) -> str:
    """The message of a disk or object store error, with the folder. Cache errors name the cache already."""
    message = storage.in_one_line(error)
    if cache.NAMED in message:
        return message
    return f"{error.filename or f'the results folder {place}'}: {message}"


class Telling:
    """Sends a trial's progress to the board: at every new stage, and at most every `TOLD_S` seconds within one."""

    def __init__(self, board: Any, trial_id: str, seconds: Seconds):
        self.board, self.trial_id, self.seconds = board, trial_id, seconds
        self.stage, self.at = "", 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float | int]) -> None:
        """Implements `distillation.Progress`; does not block."""
        now = time.monotonic()
        if stage == self.stage and now - self.at < TOLD_S:
            return
        self.stage, self.at = stage, now
        with self.seconds.spent("live view"):
            self.board.tell.remote(self.trial_id, stage, done, total)
