"""What happens in a trial's process: the trial, what it leaves in the results place, what it tells on the way."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from dfkd_ray import bundles, cache, models, results, storage, tensorboard
from dfkd_ray import trial as one_trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig
from dfkd_ray.distillation import State
from dfkd_ray.images import class_grid
from dfkd_ray.results import FINAL
from dfkd_ray.results.finals import final_row
from dfkd_ray.storage import Folder, Where
from dfkd_ray.sweep import places, tuning
from dfkd_ray.sweep.jobs import Job

log = logging.getLogger(__name__)
TOLD_S = 1.0  # between two messages of a trial on one stage
TEACHER_ACCURACIES: dict[tuple[Any, ...], float] = {}  # of this process; trials follow each other in one
OPENED: dict[str, Teacher] = {}  # of this process, by hash


class Seconds(dict[str, float]):
    """Seconds by what they were spent on."""

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Count the block's wall time under `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({what: time.perf_counter() - start})

    def add(self, more: Mapping[str, float]) -> None:
        """Add what was counted elsewhere."""
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
    """Run one trial and write what it leaves: student, picture, events, rows (its own last: then all else is there).

    An error leaves a row with status `failed`, unless it is of the disk or the store: that is tried again after
    pauses, and `OSError` where it stays. `seconds` is added to.
    """
    place, seconds = storage.folder(place), Seconds() if seconds is None else seconds
    kd, test = job.config.distillation, inputs.test

    def write_epochs(looks: Sequence[Mapping[str, float | int | None]]) -> None:
        with seconds.spent("results"):
            results.write(place, "epochs", epoch_rows(job.id, looks), job.id)
        with seconds.spent("TensorBoard"), for_show("TensorBoard"):
            tensorboard.write_epochs(place, job.id, looks)

    # The teacher is the same in every trial: one evaluation per process, not one per trial.
    known = (job.teacher.hash, kd.precision, kd.num_threads, job.config.device, None if test is None else len(test))

    def attempt() -> one_trial.Outcome:
        unfit = results.unfit(one_trial.provenance(job.config, job.teacher))
        if unfit:  # better known now than when all is computed
            return one_trial.Outcome(failed_row(job, unfit))
        return one_trial.run(
            job.config,
            job.teacher,
            replace(inputs, teacher_accuracy=TEACHER_ACCURACIES.get(known)),
            checkpoint=place / one_trial.CHECKPOINTS,
            observer=replace(observer, epochs=write_epochs),
        )

    try:
        # A checkpoint that could not be written stops the trial; the next attempt goes on from the one before.
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
    """A trial's looks at the reference set as rows of `epochs`."""
    return [results.writable("epochs", {"trial_id": trial_id, **look}) for look in looks]


@contextmanager
def for_show(what: str) -> Iterator[None]:
    """What only shows a trial changes nothing of what is recorded; what the disk or the store refuses is an error."""
    try:
        yield
    except OSError:
        raise
    except Exception:
        log.exception("%s", what)


def keep(job: Job, outcome: one_trial.Outcome, place: Folder, seconds: Seconds) -> dict[str, Any]:
    """Write everything a trial leaves, each file whole; doing it twice changes nothing. Returns the row that is there.

    That is another one where an attempt has left a final row and a later one comes to none: it stays; and a failed one
    where the table cannot hold what was measured.
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
        if row["status"] in FINAL:  # a failed one is run again on resume, and goes on from there
            with suppress(OSError):
                one_trial.remove_checkpoints(place, [job.id])
    return row


def failed_row(job: Job, reason: str) -> dict[str, Any]:
    """The row of a trial that has not come to an end."""
    return one_trial.provenance(job.config, job.teacher) | {"status": "failed", "reason": reason}


@dataclass(frozen=True)
class Shared:
    """What every trial of a sweep gets. Pickled, it is a handle: what is large is a reference, in a list of one."""

    place: str
    cache_root: str | None
    trust_code: tuple[str, ...]
    fleet: Any | None
    board: Any | None
    teachers: Mapping[str, list[Any]]  # by hash, as `bundles.to_arrays`
    tests: Mapping[str, list[Any]]  # by the teacher's hash
    reals: Mapping[str, list[Any]]  # by trial id
    code: str | None = None  # the driver's `models.code_folder`


def in_worker(
    trial_id: str,
    config: TrialConfig,
    teacher_hash: str,
    shared: Shared,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a trial in this process, and say how it went: its `row` (written here), or the `reason` it could not begin
    (the driver writes that row), or what `stopped` it, which would stop every other.

    `report`, for trials that may be stopped early, is told of each look at the reference set.
    """
    import ray

    seconds, num_steps = Seconds(), config.distillation.num_steps
    with suppress(OSError):  # an attempt before this one may have died between its row and its report
        final = final_row(shared.place, trial_id, merged=False)
        if final is not None:
            return tuning.result(final, num_steps) | {"row": json.dumps(final), "seconds": dict(seconds)}
    try:
        if teacher_hash not in OPENED:
            OPENED[teacher_hash] = bundles.from_arrays(ray.get(shared.teachers[teacher_hash][0]))
        job = Job(config, OPENED[teacher_hash], trial_id)
        test: Any = ray.get(shared.tests[teacher_hash][0])
        real: Any = ray.get(shared.reals[trial_id][0]) if trial_id in shared.reals else None
        images = shared.fleet.stream() if shared.fleet else one_trial.Local(shared.cache_root)
        inputs = one_trial.Inputs(test, real, images, trust_code=shared.trust_code)
    except Exception as error:
        log.exception("trial %s", trial_id)
        return tuning.result(None, num_steps) | {"reason": one_trial.reason_of(error)}
    progress = Telling(shared.board, trial_id, seconds) if shared.board else None

    def on_look(row: Mapping[str, Any], state: State) -> None:
        if report is not None and tuning.counts(state, num_steps):
            report(tuning.look(row, state) | {"seconds": dict(seconds)})

    try:
        with models.code_from(shared.code):
            observer = one_trial.Observer(progress, on_look if report else None)
            row = run_job(job, inputs, shared.place, observer=observer, seconds=seconds)
    except OSError as error:
        log.exception("trial %s", trial_id)
        return tuning.result(None, num_steps) | {"stopped": why_stopped(error, storage.folder(shared.place))}
    except Exception as error:
        log.exception("trial %s", trial_id)
        return tuning.result(None, num_steps) | {"reason": one_trial.reason_of(error)}
    return tuning.result(row, num_steps) | {"row": json.dumps(row), "seconds": dict(seconds)}


def why_stopped(error: OSError, place: Folder) -> str:
    """What the disk or the store says, and of which folder: the cache says so itself, all else lies in the place."""
    message = storage.in_one_line(error)
    if cache.NAMED in message:
        return message
    return f"{error.filename or f'the results folder {place}'}: {message}"


class Board:
    """What the running trials are at; an actor beside them, read by the driver."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[str, int, int]] = {}

    def tell(self, trial_id: str, stage: str, done: int, total: int) -> None:
        """Where a trial stands."""
        self.stages[trial_id] = (stage, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        """Where all stand; some have ended."""
        return self.stages


class Telling:
    """A trial's progress, told to the board at every new stage and now and then between."""

    def __init__(self, board: Any, trial_id: str, seconds: Seconds):
        self.board, self.trial_id, self.seconds = board, trial_id, seconds
        self.stage, self.at = "", 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float | int]) -> None:
        """As `distillation.Progress`; nothing is waited for."""
        now = time.monotonic()
        if stage == self.stage and now - self.at < TOLD_S:
            return
        self.stage, self.at = stage, now
        with self.seconds.spent("live view"):
            self.board.tell.remote(self.trial_id, stage, done, total)
