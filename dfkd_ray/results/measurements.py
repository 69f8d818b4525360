"""Measurements of benchmarks as one small Parquet file, from which the tables of documents are rendered.

A row is what was measured on one subject: labels that say what it is (`network`, `sparsity`, `arm`, …), a seed if there
was one, and numbers. A number may have the columns `<name>_low` and `<name>_high` beside it, the ends of its interval.
Each row also says which command made it, when, and on which kind of machine. Which columns are labels and which are
numbers is in the metadata of the file's schema.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dfkd_ray import storage
from dfkd_ray.plain import named
from dfkd_ray.results import row_files
from dfkd_ray.text import one_line

SCHEMA, KEY = "dfkd_ray.measurements/1", "dfkd_ray.measurements"
SEED, NUMERICS, COMMAND, WRITTEN_AT = "seed", "numerics", "command", "written_at_s"
MADE_BY = (NUMERICS, "package_version", COMMAND, WRITTEN_AT)
OWN = (SEED, *MADE_BY)
RESERVED = ("status",)  # a column of trials that tables read
LOW, HIGH = "_low", "_high"
MOST_BYTES = 50_000_000  # of a file
Label = str | int | float | bool


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What was measured on one subject. A number is None where it could not be measured."""

    labels: Mapping[str, Label]
    numbers: Mapping[str, float | int | Interval | None]
    seed: int | None = None

    def columns(self) -> dict[str, Any]:
        """As columns of the file."""
        found: dict[str, Any] = {**self.labels, SEED: self.seed}
        for name, number in self.numbers.items():
            if isinstance(number, Interval):
                found |= {name: number.value, name + LOW: number.low, name + HIGH: number.high}
            else:
                found[name] = None if number is None else float(number)
        return found


@dataclass(frozen=True)
class Measurements:
    """The rows of a file: `frame` has a column for each label, number and end of an interval, and those of `OWN`."""

    frame: pd.DataFrame
    labels: tuple[str, ...]
    numbers: tuple[str, ...]


def measured(rows: Sequence[Row], *, numerics: str, version: str, command: str) -> Measurements:
    """Rows of one kind, measured by a version of the package.

    `ValueError` for no row, for one with other labels than the first, or for names that clash.
    """
    if not rows:
        raise ValueError("no measurement: expected at least one row")
    labels = tuple(rows[0].labels)
    for row in rows:
        if tuple(row.labels) != labels:
            raise ValueError(f"labels {', '.join(row.labels)}: expected {', '.join(labels)}, as in the first row")
    numbers = tuple(dict.fromkeys(name for row in rows for name in row.numbers))
    taken = [*labels, *OWN, *RESERVED, *(name + end for name in numbers for end in ("", LOW, HIGH))]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        raise ValueError(f"{twice}: a label or a number has the name of another column; give it another one")
    made = {
        NUMERICS: numerics,
        "package_version": version,
        COMMAND: row_files.without_folders(pa.chunked_array([[one_line(command, 1000)]]))[0].as_py(),
        WRITTEN_AT: time.time(),
    }
    frame = pd.DataFrame([row.columns() | made for row in rows])
    frame[SEED] = frame[SEED].astype("Int64")
    return Measurements(frame, labels, numbers)


def add(path: Path, new: Measurements) -> None:
    """Write measurements into a file, beside those that it has; rows of the same labels and seed are replaced.

    `ValueError` if the file is no file of measurements, or one with other labels; it then stays as it is.
    """
    path = path.expanduser().absolute()
    frame, numbers = new.frame, new.numbers
    if path.exists():
        old = read(path)
        if set(old.labels) != set(new.labels):
            raise ValueError(
                f"{named(path)}: measurements by {', '.join(old.labels)}, and these are by {', '.join(new.labels)}; "
                "give another file"
            )
        numbers = tuple(dict.fromkeys((*old.numbers, *numbers)))
        frame = pd.concat([old.frame, frame], ignore_index=True)
        frame = frame.drop_duplicates([*new.labels, SEED], keep="last").reset_index(drop=True)
    storage.write_local(path.parent, path.name, [packed(Measurements(frame, new.labels, numbers))])


def check(path: Path) -> None:
    """`ValueError` if a file exists to which no measurement can be added: called before anything is measured."""
    if path.expanduser().exists():
        read(path.expanduser())


def packed(given: Measurements) -> memoryview:
    """The bytes of a file."""
    said = {"schema": SCHEMA, "labels": given.labels, "numbers": given.numbers}
    table = pa.Table.from_pandas(given.frame, preserve_index=False)
    return row_files.compressed(table.replace_schema_metadata({KEY: json.dumps(said)}))


def is_own(path: Path) -> bool:
    """Whether a file says of itself that it holds measurements."""
    try:
        return about(pq.read_schema(path)) is not None
    except (pa.ArrowException, OSError):
        return False


def about(found: pa.Schema) -> dict[str, Any] | None:
    """What the metadata of a schema say of measurements; None if they say nothing."""
    text = (found.metadata or {}).get(KEY.encode())
    try:
        said = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def read(path: Path) -> Measurements:
    """The measurements of a file. `ValueError` if there is no such file, or if it is damaged or of another kind."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path}: over {MOST_BYTES / 1e6:g} MB, no file of measurements")
        table = pq.ParquetFile(path).read(use_threads=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of measurements") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no readable Parquet file ({one_line(str(error), 160)})") from None
    said = about(table.schema)
    if said is None or said.get("schema") != SCHEMA:
        raise ValueError(f"{path}: no file of measurements ({SCHEMA}), which benches write")
    labels, numbers = (tuple(map(str, said.get(name) or ())) for name in ("labels", "numbers"))
    missing = [name for name in (*labels, *numbers, *OWN) if name not in table.column_names]
    if missing or not labels or not numbers:
        raise ValueError(f"{path}: damaged, it lacks the column {', '.join(missing) or 'of any label or number'}")
    wrong = [name for name in numbers if not is_number(table.schema.field(name).type)]
    if wrong:
        raise ValueError(f"{path}: damaged, the column {wrong[0]} holds no numbers")
    frame = table.to_pandas()
    frame[SEED] = frame[SEED].astype("Int64")
    return Measurements(frame, labels, numbers)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or nulls only."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
