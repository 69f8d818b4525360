"""How a running sweep is shown: a table that updates in place on a terminal, plain lines elsewhere.

`View` takes events and gives figures; it knows of no terminal and no clock. Drawing is beside it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_ray.cli.show import fleet_line, number, text_of
from dfkd_ray.cli.streams import say
from dfkd_ray.config import TrialConfig, flat, follows
from dfkd_ray.text import is_null, shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

log = logging.getLogger(__name__)
DRAW_S = 1.0
FRAME_LINES = 12  # of the table besides its running trials


@dataclass(frozen=True)
class Figures:
    """What there is to show of a sweep at one moment."""

    total: int
    done: int
    failed: int
    to_do: int
    elapsed_s: float
    left_s: float | None
    best: tuple[float, str] | None  # agreement in [0, 1] and whose it is
    running: tuple[tuple[str, str, float], ...]  # name, stage, seconds
    fleet: Mapping[str, Any] | None


class View:
    """The state of a sweep as told by events: rows, stages of running trials, how the fleet is."""

    def __init__(
        self, names: Mapping[str, str], finished: Iterable[Mapping[str, Any]], now: float, total: int | None = None
    ):
        """`names`: what to call each trial, by id; `finished`: rows of an earlier run; `now` in seconds.

        `total` is given where a search comes up with more trials on the way, whose names are added then.
        """
        self.names, self.start = dict(names), now
        self.total = len(self.names) if total is None else total
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.running: dict[str, tuple[str, float]] = {}  # stage, since when it runs
        self.best: tuple[float, str] | None = None
        self.walls: list[float] = []
        self.num_parallel = 0
        self.status: Mapping[str, Any] | None = None
        self.lock = threading.Lock()  # rows come from one thread, stages from another, a third one draws
        for row in finished:
            self._finished(row)

    def add(self, trial_id: str, config: TrialConfig, fields: Sequence[str]) -> None:
        """A search, over these fields, has come up with a trial."""
        with self.lock:
            self.names[trial_id] = name_of(flat(config.model_dump(mode="json")), fields)

    def _finished(self, row: Mapping[str, Any]) -> None:
        name: str = row["trial_id"]
        agreement: Any = row.get("agreement")
        if name in self.names and has_ended_well(row):
            self.done.add(name)
            if not is_null(agreement) and (self.best is None or agreement > self.best[0]):
                self.best = (agreement, self.names[name])

    def row(self, row: Mapping[str, Any]) -> None:
        """A trial has ended."""
        with self.lock:
            self.running.pop(row["trial_id"], None)
            if not has_ended_well(row):
                self.failed.add(row["trial_id"])
                return
            self._finished(row)
            if not is_null(row.get("wall_s")):  # one that was stopped early does not say how long others take
                self.walls.append(row["wall_s"])

    def stages(self, stages: Mapping[str, tuple[str, int, int]], now: float) -> None:
        """What runs now, and where it stands."""
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

    def figures(self, now: float) -> Figures:
        """All figures at a time."""
        with self.lock:
            to_do = self.total - len(self.done) - len(self.failed) - len(self.running)
            left_s = None
            if self.walls and self.num_parallel:
                # Finished trials say how long one takes; the running ones have some of that behind them.
                mean = sum(self.walls) / len(self.walls)
                behind = sum(min(now - since, mean) for _, since in self.running.values())
                left_s = (mean * (to_do + len(self.running)) - behind) / self.num_parallel
            running = tuple(
                (self.names.get(name, str(name)), stage, now - since) for name, (stage, since) in self.running.items()
            )
            counts = (self.total, len(self.done), len(self.failed), to_do)
            return Figures(*counts, now - self.start, left_s, self.best, running, self.status)


def has_ended_well(row: Mapping[str, Any]) -> bool:
    """Whether a row is that of a trial which finished, or was stopped early."""
    status = row.get("status")
    return not is_null(status) and status != "failed"


def names_of(trials: Mapping[str, TrialConfig]) -> dict[str, str]:
    """What to call each trial: its teacher, its method, and every field in which the trials differ."""
    plain = {name: flat(config.model_dump(mode="json")) for name, config in trials.items()}
    fields = dict.fromkeys(field for values in plain.values() for field in values)
    named = ("teacher", "synthesis.method", "pruning.sparsity")
    differing = [
        field
        for field in fields
        if field not in named and len({str(v[field]) for v in plain.values() if field in v}) > 1
    ]
    return {name: name_of(values, differing) for name, values in plain.items()}


def name_of(values: Mapping[str, Any], differing: Sequence[str]) -> str:
    """What to call a trial with these fields (dotted), of which some differ between the trials."""
    named = ("teacher", "synthesis.method", "pruning.sparsity")
    network = Path(str(values["teacher"])).name
    parts = [network, str(values["synthesis.method"]), f"sparsity {short(values[named[2]])}"]
    fields = [field for field in differing if field in values and field not in named and not follows(field)]
    # Two fields of one name and value, as the seeds of synthesis and distillation, are said once.
    told = dict.fromkeys(f"{field.rpartition('.')[2]} {short(values[field])}" for field in fields)
    return shown(" ".join([*parts, *told]))


def short(value: Any) -> str:
    """A value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Seconds in words; `-` where they are not known."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def row_line(row: Mapping[str, Any], name: str, figures: Figures, done: int, total: int) -> str:
    """The plain line of a trial that has ended."""
    if not has_ended_well(row):
        reason = row.get("reason")
        what = f"FAILED: {'no reason given' if is_null(reason) else reason}"
    else:
        accuracy = row.get("recovered_accuracy")
        tested = "" if is_null(accuracy) else f", test accuracy {number(accuracy, 100.0)} %"
        stopped = ", stopped early" if row["status"] == "stopped" else ""
        what = f"agreement {number(row.get('agreement'), 100.0)} %{tested}{stopped}"
    left = f", {duration(figures.left_s)} left" if done < total and figures.left_s is not None else ""
    return shown(f"[{done}/{total}, {figures.elapsed_s:.0f} s{left}] {name}: {what}")


def table(figures: Figures, title: str, height: int, stopping: bool = False) -> "RenderableType":
    """The table of a running sweep, for a terminal of `height` lines."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    counts = Table.grid(padding=(0, 1))
    counts.add_row(*(Text(name, "dim", no_wrap=True) for name in ("done", "running", "failed", "to do")))
    numbers = (figures.done, len(figures.running), figures.failed, figures.to_do)
    counts.add_row(*(str(count) for count in numbers))
    clock = f"{duration(figures.elapsed_s)}, left {duration(figures.left_s)}"
    best = "-" if figures.best is None else f"agreement {100 * figures.best[0]:.2f} %, {figures.best[1]}"
    fleet = "-" if figures.fleet is None else fleet_line(figures.fleet).removeprefix("fleet: ")
    top = Table.grid(padding=(0, 1), expand=True)
    top.add_column(style="dim", no_wrap=True)
    top.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    told = {"trials": counts, "time": clock, "best": Text(shown(best)), "fleet": Text(shown(fleet))}
    for name, what in told.items():
        top.add_row(name, what)

    trials = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    trials.add_column(Text(shown(title)), no_wrap=True, overflow="ellipsis", ratio=1)
    trials.add_column("stopping" if stopping else "stage", no_wrap=True)
    trials.add_column("s", justify="right", no_wrap=True)
    room = max(1, height - FRAME_LINES)
    for name, stage, seconds in figures.running[:room]:
        trials.add_row(Text(shown(name)), Text(shown(stage)), f"{seconds:.0f}")
    if len(figures.running) > room:
        trials.add_row(f"and {len(figures.running) - room} more")
    # The terminal's echo of Ctrl-C behind a full line would start another, which the next drawing would not clear.
    return Group(top, trials, Text())


class Screen:
    """Shows a view; on a terminal as a table drawn every second, elsewhere as lines. `seconds` counts what it took."""

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
            figures, trial_id = self.view.figures(self.clock()), row["trial_id"]
            say(row_line(row, self.view.names.get(trial_id, text_of(trial_id)), figures, done, total))

    def fleet(self, status: Mapping[str, Any]) -> None:
        """How the synthesizers are."""
        self.view.fleet(status)
        if not self.is_live:
            say(fleet_line(status))

    def stages(self, stages: Mapping[str, tuple[str, int, int]]) -> None:
        """What runs now."""
        self.view.stages(stages, self.clock())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While open, the table is on the terminal; elsewhere nothing."""
        if not self.is_live:
            yield
            return
        from rich.live import Live

        over = threading.Event()

        def draw() -> "RenderableType":
            figures = self.view.figures(self.clock())
            return table(figures, self.title, self.console.height, self.stopping)

        with Live(console=self.console, auto_refresh=False, transient=True) as live:

            def keep_drawing() -> None:
                while not over.wait(DRAW_S):
                    start = time.perf_counter()
                    try:
                        live.update(draw(), refresh=True)
                    except Exception as error:  # noqa: BLE001 - a sweep goes on without its table
                        log.warning("the table is not drawn any more: %s: %s", type(error).__name__, error)
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
    """What signals have asked for. Before the first trial there is nothing to stop: then it is `KeyboardInterrupt`."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self.asked = False
        self.trials_run = False

    def __call__(self, _number: int, _frame: Any) -> None:
        """As a signal handler. Printing is not safe here, writing is."""
        if self.asked:
            # Rows and checkpoints are whole at any moment. Some of Ray's processes would outlive this one by a minute.
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
        """From here on trials run: they are stopped first."""
        self.trials_run = True


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, and theirs."""
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
    """The command as it was given, to be given again: `sys.argv` and `sys.orig_argv`."""
    as_module = Path(arguments[0]).name == "__main__.py"
    return shlex.join(original if as_module else arguments)


def print_interrupted(num_finished: int, num_trials: int, place: Any) -> None:
    """What is there, and the command that goes on, but for passwords in it; on standard error."""
    from dfkd_ray.storage import without_secrets

    given = command_line(*([without_secrets(word) for word in words] for words in (sys.argv, sys.orig_argv)))
    left = num_trials - num_finished
    say(f"stopped: {num_finished} of {num_trials} trials finished, {left} to go; results: {place}", error=True)
    say(f"go on with: {given}", error=True)
