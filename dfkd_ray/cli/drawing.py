"""Draws the live table of a running sweep from a snapshot of its state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfkd_ray.cli import tables
from dfkd_ray.cli.names import Parts
from dfkd_ray.cli.show import fleet_line, short_names
from dfkd_ray.text import shown

if TYPE_CHECKING:
    from rich.console import RenderableType

FRAME_LINES = 12  # of the table besides its running trials


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of all values that the live table shows."""

    total: int
    done: int
    failed: int
    to_do: int
    elapsed_s: float
    left_s: float | None
    best: tuple[float, str] | None  # lowest KL on the reference set, and whose it is
    running: tuple[tuple[str, str, float], ...]  # name, stage, seconds
    fleet: Mapping[str, Any] | None
    parts: tuple[Parts, ...] = ()  # of the running ones
    once: str = ""  # the parts of names that all trials share


def duration(seconds: float | None) -> str:
    """Seconds as text; `-` if unknown."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def table(snapshot: Snapshot, title: str, height: int, stopping: bool = False) -> "RenderableType":
    """The table of a running sweep, for a terminal of `height` lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    counts = Table.grid(padding=(0, 1))
    counts.add_row(*(Text(name, "dim", no_wrap=True) for name in ("done", "running", "failed", "to do")))
    numbers = (snapshot.done, len(snapshot.running), snapshot.failed, snapshot.to_do)
    counts.add_row(*(str(count) for count in numbers))
    clock = f"{duration(snapshot.elapsed_s)}, left {duration(snapshot.left_s)}"
    best = "-" if snapshot.best is None else f"reference KL {snapshot.best[0]:.3g}, {snapshot.best[1]}"
    fleet = "-" if snapshot.fleet is None else fleet_line(snapshot.fleet).removeprefix("fleet: ")
    top = Table.grid(padding=(0, 1), expand=True)
    top.add_column(style="dim", no_wrap=True)
    top.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    cells = {"trials": counts, "time": clock, "best": Text(shown(best)), "fleet": Text(shown(fleet))}
    for name, what in cells.items():
        top.add_row(name, what)

    # After a full line, the terminal's echo of Ctrl-C would start a new line, which the next drawing would not clear.
    return Group(top, Running(snapshot, title, height, "stopping" if stopping else "stage"), Text())


class Running:
    """The running trials, with a column for each part of their names if that fits, else with whole names."""

    def __init__(self, snapshot: Snapshot, title: str, height: int, stage: str):
        self.snapshot, self.title, self.height, self.stage = snapshot, title, height, stage

    def __rich_console__(self, console: Any, options: Any) -> Iterator["RenderableType"]:
        """The rendering, called by rich."""
        from rich.text import Text

        running = self.snapshot.running
        fitted = self.fitted(options.max_width) if running and len(self.snapshot.parts) == len(running) else None
        if fitted is None:
            yield self.by_name()
            return
        title = f"{self.title}: {self.snapshot.once}" if self.snapshot.once else self.title
        yield Text(shown(title), "bold", no_wrap=True, overflow="ellipsis")
        yield tables.drawn(fitted)
        if len(running) > len(fitted.columns[0].cells):
            yield Text(f"and {len(running) - len(fitted.columns[0].cells)} more")

    def fitted(self, width: int) -> tables.Fitted | None:
        """The columns with one line per trial; None if they do not fit."""
        room = max(1, self.height - FRAME_LINES - 1)
        running, parts = self.snapshot.running[:room], self.snapshot.parts[:room]
        columns = []
        fields = list(dict.fromkeys(field for each in parts for field in each))
        for heading, field in zip(short_names(fields), fields, strict=True):
            cells = tuple(shown(each.get(field, "-")) for each in parts)
            columns.append(tables.Column(shown(heading), cells, tables.is_text(cells), is_field=True))
        columns.append(tables.Column(self.stage, tuple(shown(stage) for _, stage, _ in running), is_text=True))
        columns.append(tables.Column("s", tuple(f"{seconds:.0f}" for _, _, seconds in running)))
        styles = tables.TIGHT[2:]  # those without an edge
        return tables.fits(columns, width, styles) or tables.shortened_to_fit(columns, width, 12)

    def by_name(self) -> "RenderableType":
        """A table with whole names, shortened to fit."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        trials = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        trials.add_column(Text(shown(self.title)), no_wrap=True, overflow="ellipsis", ratio=1)
        trials.add_column(self.stage, no_wrap=True)
        trials.add_column("s", justify="right", no_wrap=True)
        running, room = self.snapshot.running, max(1, self.height - FRAME_LINES)
        for name, stage, seconds in running[:room]:
            trials.add_row(Text(shown(name)), Text(shown(stage)), f"{seconds:.0f}")
        if len(running) > room:
            trials.add_row(f"and {len(running) - room} more")
        return trials
