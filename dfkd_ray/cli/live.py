"""The display of a running sweep: a table that is updated in place on a terminal, plain lines elsewhere; interrupts.

`View` collects events and gives snapshots of the state, without a terminal or a clock. `drawing` draws them.
"""

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_ray.cli.drawing import Snapshot, duration, table
from dfkd_ray.cli.names import Parts, differing_parts, name_of, parts_of_one
from dfkd_ray.cli.show import fleet_line, number, text_of, warnings_in
from dfkd_ray.cli.streams import say
from dfkd_ray.config import TrialConfig, flat
from dfkd_ray.text import is_null, shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

log = logging.getLogger(__name__)
DRAW_S = 1.0


class View:
    """The state of a sweep, from events: rows, stages of running trials, status of the fleet."""

    def __init__(
        self,
        names: Mapping[str, str],
        finished: Iterable[Mapping[str, Any]],
        now: float,
        total: int | None = None,
        parts: Mapping[str, Parts] | None = None,
    ):
        """`names`: trial id → name; `finished`: rows of an earlier run; `now` in seconds.

        `total`: the number of trials of a search, which adds trials and their names later. `parts`: trial id → parts of
        its name, one column each.
        """
        self.names, self.start = dict(names), now
        self.parts, self.once = differing_parts(parts or {})
        self.total = len(self.names) if total is None else total
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.running: dict[str, tuple[str, float]] = {}  # stage, since when it runs
        self.best: tuple[float, str] | None = None
        self.walls: list[float] = []
        self.num_parallel = 0
        self.status: Mapping[str, Any] | None = None
        self.lock = threading.Lock()  # separate threads add rows, add stages, and draw
        for row in finished:
            self._finished(row)

    def add(self, trial_id: str, config: TrialConfig, fields: Sequence[str]) -> None:
        """A search over these fields has added a trial."""
        with self.lock:
            values = flat(config.model_dump(mode="json"))
            self.names[trial_id], self.parts[trial_id] = name_of(values, fields), parts_of_one(values, fields)

    def _finished(self, row: Mapping[str, Any]) -> None:
        name: str = row["trial_id"]
        kl: Any = row.get("reference_kl")
        if name in self.names and has_ended_well(row):
            self.done.add(name)
            if not is_null(kl) and (self.best is None or kl < self.best[0]):
                self.best = (kl, self.names[name])

    def row(self, row: Mapping[str, Any]) -> None:
        """A trial has ended."""
        with self.lock:
            self.running.pop(row["trial_id"], None)
            if not has_ended_well(row):
                self.failed.add(row["trial_id"])
                return
            self._finished(row)
            if not is_null(row.get("wall_s")):  # an early-stopped trial is no basis for the remaining time
                self.walls.append(row["wall_s"])

    def stages(self, stages: Mapping[str, tuple[str, int, int]], now: float) -> None:
        """Set the running trials and their stages."""
        with self.lock:
            before, self.running = self.running, {}
            for name, (stage, done, total) in stages.items():
                if name not in self.done | self.failed:
                    since = before[name][1] if name in before else now
                    self.running[name] = (f"{stage} {done}/{total}" if total > 1 else stage, since)
            self.num_parallel = max(self.num_parallel, len(self.running))

    def fleet(self, status: Mapping[str, Any]) -> None:
        """How the synthesizers are."""
        with self.lock:
            self.status = status

    def snapshot(self, now: float) -> Snapshot:
        """The state at time `now`."""
        with self.lock:
            to_do = self.total - len(self.done) - len(self.failed) - len(self.running)
            left_s = None
            if self.walls and self.num_parallel:
                # Finished trials give the time of a trial; running ones have done part of it.
                mean = sum(self.walls) / len(self.walls)
                behind = sum(min(now - since, mean) for _, since in self.running.values())
                left_s = (mean * (to_do + len(self.running)) - behind) / self.num_parallel
            running = tuple(
                (self.names.get(name, str(name)), stage, now - since) for name, (stage, since) in self.running.items()
            )
            counts = (self.total, len(self.done), len(self.failed), to_do)
            parts = tuple(self.parts[name] for name in self.running if name in self.parts)
            return Snapshot(*counts, now - self.start, left_s, self.best, running, self.status, parts, self.once)


def has_ended_well(row: Mapping[str, Any]) -> bool:
    """Whether a row is that of a finished or early-stopped trial."""
    status = row.get("status")
    return not is_null(status) and status != "failed"


def row_line(row: Mapping[str, Any], name: str, snapshot: Snapshot, done: int, total: int) -> str:
    """The plain line of a trial that has ended."""
    if not has_ended_well(row):
        reason = row.get("reason")
        what = f"FAILED: {'no reason given' if is_null(reason) else reason}"
    else:
        accuracy = row.get("recovered_accuracy")
        tested = "" if is_null(accuracy) else f", test accuracy {number(accuracy, 100.0)} %"
        stopped = ", stopped early" if row["status"] == "stopped" else ""
        warned = f"; warning: {found}" if (found := warnings_in(row)) else ""
        kl = row.get("reference_kl")
        distance = "" if is_null(kl) else f"reference KL {kl:.3g}, "
        what = f"{distance}agreement {number(row.get('agreement'), 100.0)} %{tested}{stopped}{warned}"
    left = f", {duration(snapshot.left_s)} left" if done < total and snapshot.left_s is not None else ""
    return shown(f"[{done}/{total}, {snapshot.elapsed_s:.0f} s{left}] {name}: {what}")


class Screen:
    """Shows a view: on a terminal as a table drawn every second, elsewhere as lines. `seconds`: time spent drawing."""

    def __init__(self, view: View, title: str, console: "Console | None" = None, clock: Any = time.monotonic):
        from rich.console import Console

        self.view, self.title, self.clock = view, title, clock
        self.console = console or Console()
        self.is_live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.seconds = 0.0
        self.stopping = False

    def row(self, row: Mapping[str, Any], done: int, total: int) -> None:
        """A trial has ended."""
        self.view.row(row)
        if not self.is_live or not has_ended_well(row):
            snapshot, trial_id = self.view.snapshot(self.clock()), row["trial_id"]
            say(row_line(row, self.view.names.get(trial_id, text_of(trial_id)), snapshot, done, total))

    def fleet(self, status: Mapping[str, Any]) -> None:
        """How the synthesizers are."""
        self.view.fleet(status)
        if not self.is_live:
            say(fleet_line(status))

    def stages(self, stages: Mapping[str, tuple[str, int, int]]) -> None:
        """Set the running trials and their stages."""
        self.view.stages(stages, self.clock())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While open, show the table on a terminal; does nothing elsewhere."""
        if not self.is_live:
            yield
            return
        from rich.live import Live

        over = threading.Event()

        def draw() -> "RenderableType":
            snapshot = self.view.snapshot(self.clock())
            return table(snapshot, self.title, self.console.height, self.stopping)

        with Live(console=self.console, auto_refresh=False, transient=True) as live:

            def keep_drawing() -> None:
                while not over.wait(DRAW_S):
                    start = time.perf_counter()
                    try:
                        live.update(draw(), refresh=True)
                    except Exception as error:  # noqa: BLE001 - a sweep goes on without its table
                        log.warning("the live table has stopped: %s: %s", type(error).__name__, error)
                        return
                    self.seconds += time.perf_counter() - start

            thread = threading.Thread(target=keep_drawing, daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join(timeout=5 * DRAW_S)


@contextmanager
def interruptible(screen: Screen) -> Iterator["Interrupts"]:
    """While open, Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed) ask for a clean stop; a second one ends the
    process at once. SIGHUP stays ignored where it is, as under nohup."""
    interrupts = Interrupts(screen)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupts) for number in numbers}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupts:
    """The stop requests of signals. Before the first trial there is nothing to stop: they raise `KeyboardInterrupt`."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self.asked = False
        self.trials_run = False

    def __call__(self, _number: int, _frame: Any) -> None:
        """The signal handler. `print` is not safe here; `os.write` is."""
        if self.asked:
            # Rows and checkpoints are complete at any moment. Some of Ray's processes would live a minute longer.
            for pid in descendants(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(OSError):  # standard error may be closed
                os.write(2, b"\x1b[?25h\n" if self.screen.is_live else b"")
            os._exit(130)
        self.asked = self.screen.stopping = True
        if not self.screen.is_live:
            with suppress(OSError):
                os.write(2, b"stopping; once more to stop at once\n")
        if not self.trials_run:
            raise KeyboardInterrupt

    def up(self) -> None:
        """Trials run from now on: a stop request stops them cleanly."""
        self.trials_run = True


def descendants(pid: int) -> list[int]:
    """The ids of all child processes of a process, recursively."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found, parents = [], [pid]
    while parents:
        own = children.get(parents.pop(), [])
        found += own
        parents += own
    return found


def command_line(arguments: Sequence[str], original: Sequence[str]) -> str:
    """The command line to repeat this command, from `sys.argv` and `sys.orig_argv`."""
    as_module = Path(arguments[0]).name == "__main__.py"
    return shlex.join(original if as_module else arguments)


def print_interrupted(num_finished: int, num_trials: int, place: Any) -> None:
    """Print the progress and the command that resumes, without passwords, on standard error."""
    from dfkd_ray.storage import without_secrets

    given = command_line(*([without_secrets(word) for word in words] for words in (sys.argv, sys.orig_argv)))
    left = num_trials - num_finished
    say(f"stopped: {num_finished} of {num_trials} trials finished, {left} to go; results: {place}", error=True)
    say(f"go on with: {given}", error=True)
