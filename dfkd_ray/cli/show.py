"""What the commands show: progress, the ladder of one trial, the table of a sweep."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_ray.cli.streams import say
from dfkd_ray.text import is_null, shown


class Progress:
    """Shows (stage, done, total, numbers): a line that updates on a terminal, now and then a plain line elsewhere."""

    def __init__(self, every_s: float = 15.0):
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.every_s = 0.1 if self.live else every_s
        self.stage, self.start, self.shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float | int]) -> None:
        """Show where a stage stands."""
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.start, self.shown = stage, now, 0.0
        if done < total and now - self.shown < self.every_s:
            return
        self.shown = now
        left = (now - self.start) / done * (total - done) if done else 0.0
        parts = [f"{stage} {done}/{total}"]
        parts += [f"{name} {value:.4g}" for name, value in numbers.items() if not name.startswith("class")]
        if left >= 1:
            parts.append(f"{left:.0f} s left")
        line = shown("  ".join(parts))
        if self.live:
            print(f"\r\033[K{line[:160]}", end="\n" if done == total and stage != "evaluating" else "", file=sys.stderr)
            sys.stderr.flush()
        elif stage != "evaluating":
            print(line, file=sys.stderr, flush=True)


def print_ladder(row: Mapping[str, Any], out: Path) -> None:
    """The rungs of one trial."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sparsity, method = number(row.get("achieved_sparsity"), 1.0, 4), text_of(row.get("synthesis.method"))
    table = Table(title=Text(shown(f"{text_of(row.get('teacher'))}, sparsity {sparsity}, {method} images")))
    for heading in ("rung", "test accuracy %", "points lost", "agreement % (reference set)"):
        table.add_column(heading, justify="left" if heading == "rung" else "right")
    teacher = row.get("teacher_accuracy")
    agreements = {
        "teacher": 1.0,
        "pruned": row.get("pruned_agreement"),
        "bn_reestimated": row.get("bn_reestimated_agreement"),
        "recovered": row.get("agreement"),
    }
    for name, agreement in agreements.items():
        accuracy = row.get(f"{name}_accuracy")
        lost = None if is_null(accuracy) or is_null(teacher) else teacher - accuracy  # type: ignore[operator]
        cells = (number(value, 100.0) for value in (accuracy, lost, agreement))
        table.add_row(name.replace("bn_reestimated", "BN re-estimated"), *cells)
    Console().print(table)
    if not is_null(row.get("real_data")) and row["real_data"]:
        say("real images were used: this is an upper bound, not data-free")
    stored, dense = (number(row.get(f"{kind}_bytes"), 1.0, 0, ",") for kind in ("stored", "dense"))
    say(
        f"{number(row.get('num_images'), 1.0, 0)} images in {number(row.get('synthesis_wall_s'), 1.0, 0)} s, distilled "
        f"in {number(row.get('distillation_wall_s'), 1.0, 0)} s; {stored} bytes stored, {dense} dense"
    )
    say(f"written: {out / 'student'}, {out / 'row.json'}, {out / 'images.png'}")


def print_trials(rows: Any) -> None:
    """The final table, best agreement first; of the config only the fields that differ between trials are shown."""
    from rich.console import Console

    from dfkd_ray.results import varied_fields

    fields = varied_fields(rows)
    console = Console()
    table = trials_table(rows, fields, is_narrow=False)
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    if width > console.width:
        if console.is_terminal:
            table = trials_table(rows, fields, is_narrow=True)
        else:  # a table cut to a narrow pipe hides what it is for
            console.width = width
    console.print(table)
    say("BN: BatchNorm re-estimated on synthetic images, no training; kB: stored weights; s: wall time of the trial")


def trials_table(rows: Any, fields: Sequence[str], *, is_narrow: bool) -> Any:
    """A row per trial: a column per field, or where there is no room for that all of them in one, folded."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = "best agreement with the teacher first (on the reference set); accuracies in % of the test set"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    names = short_names(fields)
    if is_narrow:
        table.add_column("trial", ratio=1, overflow="fold")
    else:
        for heading in ("network", *names):
            table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("teacher", "pruned", "BN", "recovered", "agreement", "kB", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        network, values = Path(text_of(row["teacher"])).name, [text_of(row[name]) for name in fields]
        if is_narrow:
            told = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value != "-"]
            cells = [" ".join([network, *told])]
        else:
            cells = [network, *values]
        status = text_of(row["status"])
        if status not in ("finished", "stopped"):
            cells.append("FAILED")  # why is told below the table
        else:
            rungs = ("teacher", "pruned", "bn_reestimated", "recovered")
            cells += [number(row[name], 100.0) for name in (*(f"{rung}_accuracy" for rung in rungs), "agreement")]
            if status == "stopped":
                cells[-2] = "stopped"
            cells += [number(row["stored_bytes"], 1e-3, 0), number(row["wall_s"], 1.0, 0)]
        table.add_row(*(Text(shown(cell)) for cell in cells))
    return table


def short_names(columns: Sequence[str]) -> list[str]:
    """The last parts of dotted names, where that says which."""
    leaves = [name.rpartition(".")[2] for name in columns]
    return [leaf if leaves.count(leaf) == 1 else name for name, leaf in zip(columns, leaves, strict=True)]


def fleet_line(status: Mapping[str, Any]) -> str:
    """One line on the synthesis fleet."""
    idle = [f"{100 * share:.0f}" for share in status["idle"].values() if share is not None]
    idly = ("/".join(idle) if len(idle) <= 8 else f"{sum(map(float, idle)) / len(idle):.0f} (mean)") or "-"
    hits = status["read"] + status["found"]
    line = (
        f"fleet: {status['synthesizers_up']}/{status['synthesizers']} synthesizers up, {status['images_per_s']:.1f} "
        f"images/s, queue {status['queue_depth']}, {status['made']} batches made, {hits} cache hits, idle {idly} %"
    )
    lost = f", {status['deaths']} lost" if status["deaths"] else ""
    trouble = "".join(f"; {name}: {why}" for name, why in status["trouble"].items() if why != "starting")
    return shown(line + lost + trouble)


def print_fleet(status: Mapping[str, Any]) -> None:
    """Print that line."""
    say(fleet_line(status))


def print_failures(rows: Any) -> None:
    """Why trials failed: a line per reason."""
    failed = rows[rows["status"] == "failed"]
    for reason, group in failed.groupby(failed["reason"].fillna("no reason given"), sort=True):
        names = sorted(text_of(name) for name in group["trial_id"])
        told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        say(f"{len(names)} failed: {reason} ({told})")


def number(value: Any, scale: float = 1.0, digits: int = 2, group: str = "") -> str:
    """A scaled number, or `-` for null; `group` stands between thousands."""
    return "-" if is_null(value) else f"{scale * value:{group}.{digits}f}"


def text_of(value: Any) -> str:
    """A config value in few characters."""
    if is_null(value):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
