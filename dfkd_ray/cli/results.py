"""`dfkd-ray results`: print, filter, sort and export the tables of a sweep; its other two jobs are in checks.py."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dfkd_ray.cli import checks
from dfkd_ray.cli.show import short_names
from dfkd_ray.cli.streams import say
from dfkd_ray.ladder import RUNGS
from dfkd_ray.text import is_null, last_parts, shown

Format = Literal["table", "csv", "markdown", "latex", "json", "parquet"]
SUFFIXES: dict[str, Format] = {".csv": "csv", ".md": "markdown", ".tex": "latex", ".json": "json"}
SUFFIXES |= {".parquet": "parquet"}
# The default columns, in addition to the config fields that differ between the rows.
METRICS = [
    *(rung.accuracy for rung in RUNGS),
    *("reference_kl", "agreement", "stored_bytes", "wall_s"),
]
HASH_LENGTH = 64  # hex digits; the first twelve are shown
LATEX = {**{char: f"\\{char}" for char in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"[": "{[}", "*": "{*}"}  # after the end of a row they would be read as its options
MARKUP = re.compile(r"[\\|<]")  # of Markdown, in a cell
FORMULA = tuple("=+-@\t\r")  # first characters of a text that spreadsheets would evaluate


def results(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PLACE", help="folder or URI with a sweep's results, or a rows file; with --render: documents"
        ),
    ] = None,
    table: Annotated[Literal["trials", "epochs", "synthesis"], typer.Option(help="which table")] = "trials",
    where: Annotated[
        list[str] | None, typer.Option(help="NAME, one of = != < <= > >=, VALUE or null; repeatable: all must hold")
    ] = None,
    sort: Annotated[list[str] | None, typer.Option(help="NAME, or -NAME for largest first; repeatable")] = None,
    columns: Annotated[str | None, typer.Option(help="names with commas between them")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="so many rows at most")] = None,
    format: Annotated[Format | None, typer.Option(help="default: what --out ends in, else table")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write (.csv, .md, .tex, .json, .parquet)")] = None,
    mean_std: Annotated[
        bool, typer.Option("--mean-std", help="fold finished trials that differ in seeds only: mean ± std")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="compare the results with the ranges in about.expected of their sweep file")
    ] = False,
    sweep: Annotated[Path | None, typer.Option(help="with --check: the sweep file; default: what ran in PLACE")] = None,
    render: Annotated[
        bool, typer.Option("--render", help="render the tables of Markdown documents again, from their rows files")
    ] = False,
) -> None:
    """Print a table of a sweep's results, or export it; also while the sweep runs.

    `sparsity` is short for `pruning.sparsity` if no other column ends with it. Without --columns, a printed table has
    the fields that differ and the main metrics; csv and json have all columns. In csv, texts that begin with = + - @, a
    tab or a carriage return get an apostrophe, because spreadsheets would evaluate them. Numbers are unchanged.

    dfkd-ray results runs/quickstart --where 'sparsity>=0.75' --where status=finished --sort reference_kl --limit 10

    With --check, a line for each range that the sweep file expects; exit code 1 if one is not met or has no rows.

    dfkd-ray results runs/quickstart --check

    A rows file (--out rows.parquet) holds the chosen trials without hosts and folders of machines. --render rewrites
    each table between <!-- table of ROWS.parquet … --> and <!-- end of table --> in documents, and says what changed.

    dfkd-ray results runs/quickstart --where status=finished --out rows.parquet

    dfkd-ray results --render README.md
    """
    choosing = {"where": where, "sort": sort, "columns": columns, "limit": limit, "mean-std": mean_std or None}
    given = {**choosing, "format": format, "out": out, "table": table if table != "trials" else None}
    if render:
        checks.refuse("render", given | {"check": check or None, "sweep": sweep})
        checks.render(places or [])
        return
    if len(places or ()) != 1 or not places:
        raise typer.BadParameter(f"expected one PLACE, got {len(places or ())}; several documents go with --render")
    (place,) = places
    if check:
        checks.refuse("check", given)
        checks.check(place, sweep)
        return
    if sweep is not None:
        raise ValueError("--sweep goes with --check")
    kind = format or (SUFFIXES.get(out.suffix.lower()) if out else "table")
    if kind is None:
        raise ValueError(f"--out {out}: it ends in none of {', '.join(SUFFIXES)}; say which with --format")
    if mean_std and table != "trials":
        raise ValueError(f"--mean-std is for --table trials: the rows of {table} have no seeds")
    if kind == "parquet":
        checks.refuse("format parquet", given, but=("where", "format", "out"))
        checks.write_rows(place, where or (), out)
        return

    from dfkd_ray import results as tables
    from dfkd_ray.results.selecting import with_whole_numbers

    everything = checks.frame_of(place, table)
    rows: Any = tables.select(everything, where or ())
    mixed = tables.mixed(rows)
    if mean_std:
        rows = tables.fold_seeds(rows)
    rows = tables.select(rows, (), sort or (), limit)
    names = chosen_columns(rows, table, kind, columns)
    if not mean_std:
        rows = with_whole_numbers(rows, table)
    text = FORMATS[kind](rows, names)
    if out:
        export(text, kind, out)
        say(f"written: {out} ({len(rows)} rows)")
        if mixed:
            say(mixed)
        return
    # Files and pipes get the text unchanged; on a terminal control characters are escaped.
    print(shown(text, keep="\n") if sys.stdout.isatty() else text, end="")
    if kind == "table":
        folded = f", {int(rows['num_seeds'].sum())} finished trials folded" if mean_std else ""
        say(f"{len(rows)} rows{folded}; {len(everything)} in {table}")
        if mixed:
            say(mixed)


def chosen_columns(rows: Any, table: str, kind: Format, columns: str | None) -> list[str]:
    """The columns to show: those named (with commas between them), else all or the main ones by the format.

    Where seeds are folded, csv and json have the standard deviation of each mean beside it.
    """
    from dfkd_ray.results.selecting import column_of

    if columns is not None:
        names = [column_of(name.strip(), list(rows.columns)) for name in columns.split(",") if name.strip()]
        if not names:
            raise ValueError(f"--columns {columns!r}: expected names of columns, with commas between them")
    elif kind in ("csv", "json"):
        names = list(rows.columns)
    else:
        names = main_columns(rows, table)
    if kind in ("csv", "json"):
        names = [each for name in names for each in (name, f"{name}_std") if each in rows.columns]
        names = list(dict.fromkeys(names))
    return names


def export(text: str, kind: Format, out: Path) -> None:
    """Write an exported table; it replaces only an export of the same columns."""
    from dfkd_ray import storage, targets

    target = out.expanduser().absolute()
    parent, own = storage.folder(target.parent), heading(text, kind)
    targets.check_file(
        parent,
        target.name,
        lambda data: heading(data.decode(errors="replace"), kind) == own,
        "an export of these columns",
    )
    parent.write(target.name, text.encode(errors="backslashreplace"))


def heading(text: str, kind: Format) -> str:
    """The header by which an export is recognised: an export replaces only one with the same columns."""
    if kind == "json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return ",".join(rows[0]) if isinstance(rows, list) and rows and isinstance(rows[0], dict) else text
    return "\n".join(text.splitlines()[: {"latex": 3, "markdown": 2}.get(kind, 1)])


def main_columns(rows: Any, table: str) -> list[str]:
    """The main columns that are not empty: differing fields and main metrics."""
    from dfkd_ray.results import REFERENCE_KIND, SEEDS, varied_fields
    from dfkd_ray.results.selecting import TEST_SET, num_tested_twice

    if table != "trials":
        names = [name for name in rows.columns if name not in ("written_at_s", "teacher_hash", "host", "numerics")]
    else:
        folded = "num_seeds" in rows.columns
        fields = [name for name in varied_fields(rows) if not (folded and name in SEEDS)]
        names = ["num_seeds"] if folded else ["trial_id"]
        names += [name for name in REFERENCE_KIND if rows[name].nunique(dropna=False) > 1]
        names = ["teacher", *fields, *names, *METRICS]
        if num_tested_twice(rows):
            names.append(TEST_SET)
        if not folded and (rows["status"] != "finished").any():
            names += ["status", "reason"]
    return [name for name in names if rows[name].notna().any()] or names[:1]


def cells(rows: Any, names: Sequence[str]) -> list[list[str]]:
    """Rows as text of one line; a mean with its standard deviation."""
    columns = []
    for name in names:
        texts = [text_of(value) for value in rows[name]]
        if f"{name}_std" in rows.columns:
            spreads = rows[f"{name}_std"]
            texts = [a if is_null(b) else f"{a} ± {b:.2g}" for a, b in zip(texts, spreads, strict=True)]
        if name == "teacher":
            called = last_parts(texts)
            texts = [called[text] for text in texts]
        columns.append([shown(text) for text in texts])
    return [list(row) for row in zip(*columns, strict=True)]


def text_of(value: Any) -> str:
    """A value in few characters."""
    if is_null(value):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    text = str(value)
    return text[:12] if len(text) == HASH_LENGTH and not set(text) - set("0123456789abcdef") else text


def as_table(rows: Any, names: Sequence[str]) -> str:
    """For a terminal."""
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name, heading in zip(names, short_names(names), strict=True):
        table.add_column(heading, justify="right" if is_number(rows, name) else "left", no_wrap=True)
    for row in cells(rows, names):
        table.add_row(*row)
    # In a pipe the table keeps its full width: cut columns would be useless.
    console = Console(file=StringIO(), width=10_000, markup=False, highlight=False, emoji=False)
    console.width = console.measure(table).maximum
    console.print(table)
    assert isinstance(console.file, StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


def as_markdown(rows: Any, names: Sequence[str]) -> str:
    """A GitHub Markdown table; markup in cells is escaped."""
    marks = ["---:" if is_number(rows, name) else "---" for name in names]
    lines = [short_names(names), marks, *([MARKUP.sub(r"\\\g<0>", cell) for cell in row] for row in cells(rows, names))]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_latex(rows: Any, names: Sequence[str]) -> str:
    """A tabular with the rules of the package booktabs."""
    places = "".join("r" if is_number(rows, name) else "l" for name in names)
    heading, *lines = (
        " & ".join("".join(LATEX.get(char, char) for char in cell) for cell in line) + r" \\"
        for line in [short_names(names), *cells(rows, names)]
    )
    start = rf"\begin{{tabular}}{{{places}}}"
    return "\n".join([start, r"\toprule", heading, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(rows: Any, names: Sequence[str]) -> str:
    """CSV with full names and all digits; texts that a spreadsheet would evaluate begin with an apostrophe."""
    plain = rows[list(names)].copy()
    for name in plain.columns:
        if not is_number(plain, name):
            plain[name] = plain[name].map(lambda cell: f"'{cell}" if is_formula(cell) else cell)
            plain[name] = plain[name].map(lambda cell: cell.replace("\0", "\\x00") if isinstance(cell, str) else cell)
    # Cells with a character of the line terminator are quoted: a lone carriage return would otherwise end the row.
    return plain.to_csv(index=False, lineterminator="\0\r\n").replace("\0\r\n", "\n")


def is_formula(cell: Any) -> bool:
    """Whether a cell is a text that spreadsheets would evaluate as a formula."""
    return isinstance(cell, str) and cell.startswith(FORMULA)


def as_json(rows: Any, names: Sequence[str]) -> str:
    """A list of objects, full names and all digits."""
    plain = rows[list(names)].astype(object)
    plain = plain.where(plain.notna(), None)
    records = [dict(zip(plain.columns, row, strict=True)) for row in plain.itertuples(index=False, name=None)]
    return json.dumps(records, indent=2, allow_nan=False) + "\n"


def is_number(rows: Any, name: str) -> bool:
    """Whether a column is numeric and thus right-aligned."""
    return rows[name].dtype.kind in "iuf"


FORMATS = {"table": as_table, "csv": as_csv, "markdown": as_markdown, "latex": as_latex, "json": as_json}
