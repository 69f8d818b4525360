"""The cells of a document's table: mean ± std over seeds, computed from rows of trials or measurements. Pure.

A cell holds rows that differ in seeds only, on one test set; anything else is refused, never averaged.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd

from dfkd_ray.report.specification import Level, Specification
from dfkd_ray.report.wording import Frame, number, plus_minus, short
from dfkd_ray.results import selecting
from dfkd_ray.results.measurements import HIGH, LOW
from dfkd_ray.results.metrics import Metric
from dfkd_ray.text import code, is_null, last_parts, table

BOLD = "**"
MOST_LINES = 200  # of an axis
NUM_NAMED = 3  # columns named in a refusal
SIMPLE = " -+=.,:_()"  # signs that mean nothing in Markdown within a name


@dataclass(frozen=True)
class Line:
    """A row or a column of a table: its label, its conditions, its metric if it has one."""

    label: str
    where: Mapping[str, Any]
    metric: str | None

    @property
    def is_bold(self) -> bool:
        """Whether its cells are bold: its label is."""
        return self.label.startswith(BOLD) and self.label.endswith(BOLD)


@dataclass(frozen=True)
class Cell:
    """The mean and sample standard deviation of a metric over `num` rows; None where there is none.

    `interval`: of a single measurement that has one.
    """

    mean: float | None
    std: float | None
    num: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Filled:
    """A table's cells, by row and column, and the trials that they are about, of any status."""

    rows: Sequence[Line]
    columns: Sequence[Line]
    cells: Sequence[Sequence[Cell]]
    behind: Sequence[float | None]
    used: Frame

    @property
    def usual_num(self) -> int:
        """The number of seeds that most cells have; 0 if no cell has any."""
        nums = Counter(cell.num for row in self.cells for cell in row if cell.num)
        return max(nums, key=lambda num: (nums[num], num), default=0)


def filled(trials: Frame, spec: Specification, fixed: Sequence[str] | None = None) -> Filled:
    """The cells of a table. `ValueError` if a cell mixes configurations, or if no row meets the conditions.

    `fixed`: the columns that are equal in rows that differ in seeds only; default: those of trials.
    """
    fixed = selecting.fixed_columns() if fixed is None else fixed
    trials = trials.loc[selecting.matching_all(trials, spec.where)]
    rows, columns = lines_of(spec.rows, trials), lines_of(spec.columns, trials)
    finished = trials.loc[trials["status"] == "finished"]
    groups = selecting.seed_groups(finished, fixed)
    down, across = ([selecting.matching_all(trials, line.where) for line in axis] for axis in (rows, columns))
    used = sum((row & column for row, column in product(down, across)), pd.Series(False, trials.index)).astype(bool)
    if not used.any():
        raise ValueError("no row of its file is in any of its cells")
    cells = []
    for row, mask in zip(rows, down, strict=True):
        own = []
        for column, other in zip(columns, across, strict=True):
            name = f"cell {row.label!r}, {column.label!r}"
            of = spec.metric_of(row.metric or column.metric or spec.metric or "")
            mine = finished.loc[(mask & other)[finished.index]]
            if selecting.num_values(groups.to_frame("group").loc[mine.index], "group") > 1:
                raise ValueError(differing(mine, fixed, name))
            own.append(cell_of(mine, of, name))
        cells.append(own)
    behind = [
        behind_of(finished.loc[(mask & used)[finished.index]], spec, row) for row, mask in zip(rows, down, strict=True)
    ]
    return Filled(rows, columns, cells, behind, trials.loc[used])


def lines_of(levels: Sequence[Level], trials: Frame) -> list[Line]:
    """The rows or columns of a table: all combinations of its levels."""
    lines = [Line("", {}, None)]
    for level in levels:
        lines = [both(line, other) for line in lines for other in entries_of(level, trials)]
        if len(lines) > MOST_LINES:
            raise ValueError(f"more than {MOST_LINES} rows or columns")
    return lines


def both(line: Line, other: Line) -> Line:
    """Two levels in one: `0.75: **recovered**` is bold as a whole."""
    parts = [part for part in (line.label, other.label) if part]
    text = ": ".join(part.strip("*") if part.startswith(BOLD) and part.endswith(BOLD) else part for part in parts)
    bold = BOLD if line.is_bold or other.is_bold else ""
    return Line(f"{bold}{text}{bold}", {**line.where, **other.where}, line.metric or other.metric)


def entries_of(level: Level, trials: Frame) -> list[Line]:
    """The entries of a level; all values of its column, in order, where it names none."""
    if level.entries is not None:
        return [Line(text, where, level.metrics.get(text)) for text, where in level.entries.items()]
    assert level.column is not None
    values = trials[level.column]
    found = sorted(values.dropna().unique().tolist()) + ([None] if values.isna().any() else [])
    teachers = last_parts(str(value) for value in found if value is not None) if level.column == "teacher" else {}
    return [Line(label_of(teachers.get(value, value)), {level.column: value}, None) for value in found]


def label_of(value: Any) -> str:
    """The label of a value from rows; a name that could be markup becomes a code span."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # pandas reads whole numbers with nulls as floats
        return str(int(value))
    text = short(value)
    return text if all(sign.isalnum() or sign in SIMPLE for sign in text.replace("–", "-")) else code(text)


def differing(own: Frame, fixed: Sequence[str], name: str) -> str:
    """Why rows that differ in more than seeds have no mean."""
    varied = [column for column in fixed if selecting.num_values(own, column) > 1]
    more = ", …" if len(varied) > NUM_NAMED else ""
    return (
        f"{name}: its {len(own)} rows differ in {', '.join(varied[:NUM_NAMED])}{more}, not in seeds alone; say which "
        "in where, rows or columns"
    )


def cell_of(own: Frame, of: Metric, name: str) -> Cell:
    """A cell from its finished rows. `ValueError`, with the cell's name, if they are of several test sets."""
    if of.is_tested and "test_sha256" in own and selecting.num_values(own, "test_sha256") > 1:
        raise ValueError(f"{name}: its trials were measured on different test images (test_sha256)")
    values = of.of(own).dropna()
    if values.empty:
        return Cell(None, None, 0)
    interval = None
    if len(values) == 1 and {of.name + LOW, of.name + HIGH} <= set(own.columns):
        low, high = (float(own[of.name + end].loc[values.index[0]]) for end in (LOW, HIGH))
        interval = None if is_null(low) or is_null(high) else (low, high)
    return Cell(float(values.mean()), float(values.std()) if len(values) > 1 else None, len(values), interval)


def behind_of(own: Frame, spec: Specification, row: Line) -> float | None:
    """The number behind a row's label; None where there is none. `ValueError` if the row's trials differ in it."""
    if spec.behind is None:
        return None
    values = spec.metric_of(spec.behind).of(own).dropna().unique()
    if len(values) > 1:
        raise ValueError(f"row {row.label!r}: its trials differ in {spec.behind}, which stands behind its label")
    return float(values[0]) if len(values) else None


def as_markdown(done: Filled, spec: Specification) -> str:
    """The table in Markdown: `–` where nothing was measured, a number in brackets for an unusual number of seeds."""
    usual = done.usual_num
    body = []
    for row, cells, behind in zip(done.rows, done.cells, done.behind, strict=True):
        texts = []
        for column, cell in zip(done.columns, cells, strict=True):
            of = row.metric or column.metric or spec.metric or ""
            texts.append(cell_text(cell, spec, of, usual, row.is_bold or column.is_bold))
        body.append([row.label if behind is None else f"{row.label} ({value_text(behind, spec)})", *texts])
    return table([" ".join(spec.heading.split()), *(column.label for column in done.columns)], body)


def value_text(value: float, spec: Specification) -> str:
    """The number behind a label."""
    how = spec.format_of(spec.behind or "")
    return number(value, how.decimals, how.times)


def cell_text(cell: Cell, spec: Specification, of: str, usual: int, bold: bool) -> str:
    """`0.25 ± 0.02` or `0.25 (0.20 to 0.31)`, with `(2)` behind it where the number of seeds is not the usual one."""
    if is_null(cell.mean):
        return "–"
    how = spec.format_of(of)
    text = plus_minus(cell.mean, cell.std, how.times, how.decimals).replace("\u00a0", " ")
    if cell.interval is not None:
        text += f" ({' to '.join(number(end, how.decimals, how.times) for end in cell.interval)})"
    text = f"{BOLD}{text}{BOLD}" if bold else text
    return text if cell.num == usual else f"{text} ({cell.num})"
