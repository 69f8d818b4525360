"""Tracks trials in the driver: running ones, number done, callbacks; writes rows a trial's process cannot write.

Those are the rows of trials that could not start, whose process died, or that were stopped early. Progress callbacks
are called after a row is written. An exception in a callback is logged and changes no row.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import pyarrow as pa

from dfkd_ray import results
from dfkd_ray import trial as one_trial
from dfkd_ray.storage import Folder, in_one_line
from dfkd_ray.sweep import places, tune_reports
from dfkd_ray.sweep.jobs import Job
from dfkd_ray.sweep.search import StopConfig
from dfkd_ray.sweep.worker import Seconds, failed_row, keep

log = logging.getLogger(__name__)
P = ParamSpec("P")
OnRow = Callable[[Mapping[str, Any], int, int], None]
COMPACT_EVERY = 200  # trials: a table of more files is slow to read
RETRIES = 2  # restarts of a trial whose process died
DIED = f"the trial's process died {RETRIES + 1} times (killed, or out of memory)"


def harmless(show: Callable[P, None]) -> Callable[P, None]:
    """`show`, with every exception but `KeyboardInterrupt` suppressed; the first one is logged.

    Without this, Ray Tune would count an exception in a callback as a failure of the trial.
    """
    logged = False

    def shows(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal logged
        try:
            show(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - SystemExit too: a display must not end a trial
            if not logged:
                logged = True
                why = one_trial.reason_of(error) if isinstance(error, Exception) else type(error).__name__
                log.warning("a progress callback failed, the sweep continues: %s", why)

    return shows


class Ledger:
    """The states of all trials, as the driver knows them. A search appends to `todo` until it has `total` jobs."""

    def __init__(
        self,
        todo: list[Job],
        place: Folder,
        on_row: OnRow | None,
        seconds: Seconds,
        total: int | None = None,
        on_new: Callable[[Job], None] = lambda _job: None,
    ):
        self.todo, self.place, self.seconds = todo, place, seconds
        self.on_row = harmless(on_row) if on_row else None
        self.total, self.on_new = len(todo) if total is None else total, harmless(on_new)
        self.running: dict[str, str] = {}
        self.num_done = 0
        self.trouble: str | None = None  # an error that every trial would meet: the sweep stops

    def add(self, job: Job) -> int:
        """Append a job that a search has chosen; returns its index."""
        self.todo.append(job)
        self.on_new(job)
        return len(self.todo) - 1

    def started(self, job: Job) -> None:
        """The trial's process has started or is starting."""
        self.running[job.id] = "starting"

    def again(self, job: Job) -> None:
        """The trial's process died; a new one resumes from its checkpoint."""
        self.running[job.id] = "starting again"

    def died(self, job: Job) -> None:
        """The trial's process died too often: write a failed row."""
        self.ended(job, {"reason": DIED})

    def ended(self, job: Job, report: Mapping[str, Any]) -> None:
        """The trial ended with the result `report` of `in_worker`; without one if the sweep was stopped."""
        self.running.pop(job.id, None)
        self.seconds.add(report.get("seconds", {}))
        if "stopped" in report:
            self.trouble = self.trouble or str(report["stopped"])
        elif "reason" in report:
            self.keep(job, one_trial.Outcome(failed_row(job, report["reason"])))
        elif "row" in report:
            self.count(json.loads(report["row"]))

    def cut(self, job: Job, report: Mapping[str, Any], stop: StopConfig) -> None:
        """The trial was stopped early; `report` is its last report."""
        self.running.pop(job.id, None)
        self.seconds.add(report.get("seconds", {}))
        row = tune_reports.stopped_row(job, report, stop)
        self.keep(job, one_trial.Outcome(row, epochs=tuple(json.loads(report["looks"]))))

    def keep(self, job: Job, outcome: one_trial.Outcome) -> None:
        """Write a row for the trial, unless its process has already written a final row. Report the row that stands."""
        try:
            row = places.persistently(lambda: keep(job, outcome, self.place, self.seconds))
        except (OSError, ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            self.trouble = self.trouble or f"{self.place}: {in_one_line(error)}"
            return
        self.count(row)

    def count(self, row: Mapping[str, Any]) -> None:
        """Count a finished row, compact the tables now and then, and call `on_row`."""
        self.num_done += 1
        if self.num_done % COMPACT_EVERY == 0:
            with self.seconds.spent("results"):
                compact(self.place)
        if self.on_row:
            with self.seconds.spent("live view"):
                self.on_row(row, self.num_done, self.total)


def compact(place: Folder) -> None:
    """Merge the tables' small files. A failure is logged: no row is lost, and the next sweep tries again."""
    try:
        results.compact(place)
    except (OSError, ValueError, pa.ArrowException) as error:
        log.warning("%s: its tables stay in many small files: %s", place, error)
