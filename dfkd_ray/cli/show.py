"""Output of the commands: progress, the ladder of one trial, the final table of a sweep."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_ray.cli import tables
from dfkd_ray.cli.streams import say
from dfkd_ray.ladder import BESIDE, QUANTISED, RUNGS, TEACHER, ended_early
from dfkd_ray.text import is_null, last_parts, shown

TITLE = "closest to the teacher first (reference KL); accuracies in % of the test set"
LEGEND = (
    "KL, agreement: with the teacher on the reference set; BN: BatchNorm re-estimated on synthetic images, recon.: "
    "layers reconstructed on them, both without training; kB: stored weights; s: wall time of the trial"
)
# heading of the final table: (column, scale, digits, rank); columns of the highest rank are left out first
MEASURED: dict[str, tuple[str, float, int, int]] = {
    **{rung.heading: (rung.accuracy, 100.0, 2, rung.rank) for rung in RUNGS},
    "KL": ("reference_kl", 1.0, 4, 0),
    "agreement": ("agreement", 100.0, 2, 2),
    "kB": ("stored_bytes", 1e-3, 0, 4),
    "s": ("wall_s", 1.0, 0, 5),
}


class Progress:
    """Shows (stage, done, total, numbers): an updating line on a terminal, occasional plain lines elsewhere."""

    def __init__(self, every_s: float = 15.0):
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.every_s = 0.1 if self.live else every_s
        self.stage, self.start, self.shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float | int]) -> None:
        """Show the progress of a stage."""
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
    """Print the rungs of one trial."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sparsity, method = number(row.get("achieved_sparsity"), 1.0, 4), text_of(row.get("synthesis.method"))
    by_channels = text_of(row.get("pruning.structure")) == "channels"
    removed = f"{sparsity} of the parameters removed by channels" if by_channels else f"sparsity {sparsity}"
    table = Table(title=Text(shown(f"{text_of(row.get('teacher'))}, {removed}, {method} images")))
    for heading in ("rung", "test accuracy %", "points lost", "agreement % (reference set)"):
        table.add_column(heading, justify="left" if heading == "rung" else "right")
    teacher = row.get(TEACHER.accuracy)
    for rung in RUNGS:
        agreement = 1.0 if rung.agreement is None else row.get(rung.agreement)
        accuracy = row.get(rung.accuracy)
        if rung is QUANTISED and is_null(agreement):
            continue
        lost = None if is_null(accuracy) or is_null(teacher) else teacher - accuracy  # type: ignore[operator]
        cells = (number(value, 100.0) for value in (accuracy, lost, agreement))
        table.add_row(rung.label, *cells)
    Console().print(table)
    if by_channels:
        own, before = (number(row.get(name), 1.0, 0, ",") for name in ("num_macs", "teacher_num_macs"))
        say(f"{own} multiplications an image, of the teacher {before}")
    if not is_null(row.get("real_data")) and row["real_data"]:
        say("real images were used: this is an upper bound, not data-free")
    if not is_null(row.get("test_set")):
        say(f"tested on {row['test_set']}, {row['num_test_images']:,} images (sha256 {str(row['test_sha256'])[:12]})")
    stored, dense = (number(row.get(f"{kind}_bytes"), 1.0, 0, ",") for kind in ("stored", "dense"))
    reconstruction_s = row.get("reconstruction_wall_s")
    fitted = "" if is_null(reconstruction_s) else f"reconstructed in {number(reconstruction_s, 1.0, 0)} s, "
    distilled = f"distilled in {number(row.get('distillation_wall_s'), 1.0, 0)} s"
    if ended_early(row):
        limits = f"reference KL {row['reference_kl']:.3f}, enough_kl={row['enough_kl']:g}"
        distilled = f"near enough without distillation ({limits})"
    say(
        f"{number(row.get('num_images'), 1.0, 0)} images {made_in(row)}, {fitted}{distilled}; "
        f"{stored} bytes stored, {dense} dense"
    )
    if not is_null(row.get("int8_file_bytes")):
        sizes = (number(row.get(f"{kind}_file_bytes"), 1.0, 0, ",") for kind in ("int8", "float"))
        say("int8 file {}: {} bytes, in float32 {}".format(out / "student" / "int8.onnx", *sizes))
    if warned := warnings_in(row):
        say(f"warning: {warned}")
    say(f"written: {out / 'student'}, {out / 'row.json'}, {out / 'images.png'}")


def made_in(row: Mapping[str, Any]) -> str:
    """How long the images of one trial took, and when, as far as they were found in the cache."""
    seconds, num_found = f"in {number(row.get('synthesis_wall_s'), 1.0, 0)} s", row.get("num_cached_batches")
    if is_null(num_found) or not num_found:
        return seconds
    if num_found * row["synthesis.batch_size"] >= row["num_images"]:
        return f"from the cache, made earlier {seconds}"
    return f"{seconds}, those from the cache ({num_found} batches, made earlier) counted"


def print_trials(rows: Any, place: object = "PLACE") -> None:
    """Print the final table, lowest KL first, with only those config fields that differ between trials."""
    from rich.console import Console
    from rich.text import Text

    from dfkd_ray.results import varied_fields

    console = Console()
    # In a pipe the table keeps its full width: cut columns would be useless.
    table, notes = trials_table(rows, varied_fields(rows), console.width if console.is_terminal else None, place)
    if not console.is_terminal:
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=10**6)).maximum
        )
    console.print(table)
    for note in notes:
        console.print(Text(note), soft_wrap=not console.is_terminal)


def trials_table(rows: Any, fields: Sequence[str], width: int | None, place: object = "PLACE") -> tuple[Any, list[str]]:
    """A table with a row per trial and a column per field, fitted to a terminal's width; and the notes below it.

    Without a width nothing is shortened or left out.
    """
    columns, notes = trial_columns(rows, fields), [LEGEND]
    fitted = tables.fits(columns, 10**9 if width is None else width, tables.AS_THEY_ARE)
    if fitted is None and width is not None:
        columns, said = tables.said_once(columns)
        notes += said
        fitted = tables.fits(columns, width, tables.ROOMY)
        if fitted is None:
            columns, said = teachers_said_once(columns)
            notes += said
            fitted = tables.fits(columns, width, tables.TIGHT) or tables.squeezed(columns, width)
    assert fitted
    missing = {"not shown": fitted.left_out, "shortened": fitted.cut}
    left_out = [f"{how}: {', '.join(names)}" for how, names in missing.items() if names]
    if left_out:
        left_out.append(f"all of it: dfkd-ray results {shlex.quote(str(place))}")
        notes.append(f"at {width} columns {'; '.join(left_out)}")
    return tables.drawn(fitted, TITLE, width), [shown(note) for note in notes]


def trial_columns(rows: Any, fields: Sequence[str]) -> list[tables.Column]:
    """All columns of the final table; of the rungs those that some row has."""
    teachers = [text_of(name) for name in rows["teacher"]]
    called = last_parts(teachers)
    named = [("network", [called[name] for name in teachers])]
    for name, field in zip(short_names(fields), fields, strict=True):
        named.append((name, [text_of(value) for value in rows[field]]))
    columns = []
    for name, cells in named:
        texts = tuple(shown(cell) for cell in cells)
        columns.append(tables.Column(shown(name), texts, tables.is_text(texts), is_field=True))
    statuses = [text_of(status) for status in rows["status"]]
    unmeasured = {rung.heading for rung in BESIDE if rung.accuracy not in rows or rows[rung.accuracy].isna().all()}
    for heading, (name, scale, digits, rank) in MEASURED.items():
        if heading in unmeasured:
            continue
        cells = [number(value, scale, digits) for value in rows[name]]
        for index, status in enumerate(statuses):
            if status not in ("finished", "stopped"):  # the reason is printed below the table
                cells[index] = "FAILED" if heading == "recovered" else ""
            elif status == "stopped" and heading == "recovered":
                cells[index] = "stopped"
        columns.append(tables.Column(heading, tuple(cells), rank=rank))
    return columns


def teachers_said_once(columns: Sequence[tables.Column]) -> tuple[list[tables.Column], list[str]]:
    """The columns without the teachers' accuracies, and a line with these instead, if there are only few."""
    teacher = next(column for column in columns if column.heading == "teacher" and not column.is_field)
    network = columns[0].cells if columns[0].heading == "network" else ("",) * len(teacher.cells)
    pairs = sorted({pair for pair in zip(network, teacher.cells, strict=True) if pair[1] not in ("", "-")})
    if not pairs or len(pairs) > 6 or len(dict(pairs)) < len(pairs):
        return list(columns), []
    text = ", ".join(f"{network} {accuracy}".strip() for network, accuracy in pairs)
    return [column for column in columns if column is not teacher], [f"accuracy of the teacher: {text}"]


def short_names(columns: Sequence[str]) -> list[str]:
    """The last parts of dotted names, if they are unique."""
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
    """Print the reasons why trials failed, one line each."""
    failed = rows[rows["status"] == "failed"]
    for reason, group in failed.groupby(failed["reason"].fillna("no reason given"), sort=True):
        names = sorted(text_of(name) for name in group["trial_id"])
        text = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        say(f"{len(names)} failed: {reason} ({text})")


def warnings_in(row: Mapping[str, Any]) -> str:
    """A row's warnings, those of its latency included; empty without one."""
    return "; ".join(str(row[name]) for name in ("warnings", "latency_warning") if not is_null(row.get(name)))


def print_warnings(rows: Any) -> None:
    """Print how many trials have warnings, with that of the first, and where the others are."""
    warned = [row for row in rows.to_dict("records") if warnings_in(row)]
    if warned:
        first = warned[0]
        say(
            f"{len(warned)} of {len(rows)} trials have warnings (column `warnings`, and the report), such as "
            f"{text_of(first['trial_id'])}: {warnings_in(first)}"
        )


def number(value: Any, scale: float = 1.0, digits: int = 2, group: str = "") -> str:
    """A scaled number, or `-` for null; `group` stands between thousands."""
    return "-" if is_null(value) else f"{scale * value:{group}.{digits}f}"


def text_of(value: Any) -> str:
    """A config value as short text."""
    if is_null(value):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
