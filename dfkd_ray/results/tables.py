"""Reading, writing and compacting of the tables in a place.

A part is small, has one writer and is written whole. Compaction writes many parts into one file and then deletes
them: a crash between the two leaves rows twice, and readers drop what they find twice. It never touches a part that
may be written again (the own part of a trial that has not finished), so no row can be lost to a race.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dfkd_ray import storage
from dfkd_ray.results import schemas
from dfkd_ray.results.rows import is_not_finite
from dfkd_ray.storage import Folder, Where

log = logging.getLogger(__name__)

SUFFIX = ".parquet"
MERGED = "merged-"
PART_NAME = re.compile(r"(t-[0-9a-f]{12}|merged-[0-9a-f]{16}|k-[0-9a-f]{16}-\d+)\.parquet")  # of sweeps
LEFTOVER_S = 600.0  # a part is written in seconds: an older temporary file has no writer any more
NUM_THREADS = 16  # of reading: parts are small, and on an object store each is a wait for the network
ATTEMPTS = 20
FINAL = ("finished", "stopped")  # statuses of trials that are not run again
# Best first is by agreement on the reference set, never by test accuracy.
ORDERS: dict[str, dict[str, bool]] = {
    "trials": {"agreement": False, "reference_kl": True, "trial_id": True},
    "epochs": {"trial_id": True, "step": True},
    "synthesis": {"synthesis_key": True, "batch_index": True},
}


def read(place: Where, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A table of a place, or some of its columns; each row once, in the table's order.

    `trials`: best agreement first, failed last. `epochs`: by trial and step. `synthesis`: by key and batch index.
    `ValueError` where there is no such table or column, and for a part that is damaged or of a newer version.
    """
    schemas.known(table, columns or ())
    needed = None if columns is None else list(dict.fromkeys([*columns, *_bookkeeping(table)]))
    folder = storage.folder(place) / table
    parts = read_parts(folder, table, needed)
    if not parts:
        raise ValueError(f"{storage.folder(place)}: no {table} table there (expected {folder}/*{SUFFIX})")
    frame = distinct(pa.concat_tables(parts.values()), table).to_pandas()
    return frame if columns is None else frame[list(columns)]


def is_place(place: Where) -> bool:
    """Whether some table of ours lies in a place: a part of one of our names, or the first part can be read."""
    for table in schemas.TABLES:
        folder = storage.folder(place) / table
        names = part_names(folder)
        if any(PART_NAME.fullmatch(name) for name in names):
            return True
        for name in names[:1]:
            try:
                parsed(folder, name, table, schemas.schema(table).names)
            except ValueError:
                continue
            return True
    return False


def read_part(place: Where, table: str, part: str) -> pd.DataFrame | None:
    """The rows of one part, as its writer left them; None where it is not there (any more)."""
    rows = parsed(storage.folder(place) / table, part + SUFFIX, table, schemas.schema(table).names)
    return None if rows is None else rows.to_pandas()


def write(place: Where, table: str, rows: Sequence[Mapping[str, Any]], part: str) -> None:
    """Write rows as `<table>/<part>.parquet`, whole, over what was there.

    What a row leaves out is null, and so is a number that is not finite. `KeyError` for a column not in the schema, an
    error of Arrow for a value that does not fit (`kept` and `writable` make rows fit); whatever the disk or the network
    refuses is an `OSError`.
    """
    wanted = schemas.schema(table)
    unknown = {name for row in rows for name in row} - set(wanted.names)
    if unknown:
        raise KeyError(f"columns not in version {schemas.version(table)} of {table}: {sorted(unknown)}")
    now = {schemas.WRITTEN_AT: time.time()}
    plain = [{name: None if is_not_finite(row.get(name)) else row.get(name) for name in wanted.names} for row in rows]
    plain = [row | now for row in plain]
    (storage.folder(place) / table).write(part + SUFFIX, encoded(pa.Table.from_pylist(plain, schema=wanted)))


def write_batches(place: Where, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of `synthesis`, a part per key and number of batches, where not there already.

    Trials that share a key would write the same part: whoever comes first does.
    """
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_key.setdefault(row["synthesis_key"], []).append(row)
    there = set((storage.folder(place) / "synthesis").names())
    for key, own in by_key.items():
        part = f"k-{key[:16]}-{len(own)}"
        if part + SUFFIX not in there:
            write(place, "synthesis", own, part)


def finished_ids(place: Where) -> set[str]:
    """Trials with a row that is final: finished, or stopped early."""
    root = storage.folder(place)
    if not part_names(root / "trials"):
        return set()
    rows = read(root, "trials", ["trial_id", "status"])
    return set(rows[rows["status"].isin(FINAL)]["trial_id"])


def compact(place: Where) -> int:
    """Make one file of the parts of each table; returns how many parts that took the place of.

    May run while trials do, and twice at once. The parts of trials that have not finished stay: they may be written
    again. Rows of older versions become today's.
    """
    root = storage.folder(place)
    finished = finished_ids(root)  # before any part is read: a trial's own row is the last that it writes
    num_merged = 0
    for table in schemas.TABLES:
        folder = root / table
        parts = {
            name: rows for name, rows in read_parts(folder, table).items() if is_settled(name, rows, table, finished)
        }
        if len(parts) > 1:
            rows = distinct(pa.concat_tables(parts.values()), table)
            today = pa.Table.from_arrays(rows.columns, schema=schemas.schema(table))
            folder.write(f"{MERGED}{secrets.token_hex(8)}{SUFFIX}", encoded(today))
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                list(pool.map(folder.remove, parts))
            num_merged += len(parts)
        remove_leftovers(folder)
    log.info("%s: %d parts compacted", root, num_merged)
    return num_merged


def is_settled(name: str, rows: pa.Table, table: str, finished: set[str]) -> bool:
    """Whether nobody will write that part again: it is not the own part of a trial that has not finished."""
    own = name.removesuffix(SUFFIX)
    if table == "synthesis" or own in finished:
        return True
    return own not in rows.column("trial_id").to_pylist()


def remove_leftovers(folder: Folder) -> None:
    """Remove what writers that were killed left on a disk."""
    for name, (_, changed) in folder.sizes().items():
        if storage.is_part(name) and changed is not None and time.time() - changed > LEFTOVER_S:
            folder.remove(name)


def part_names(folder: Folder) -> list[str]:
    """Names of the parts in a table's folder, sorted."""
    return [name for name in folder.names() if name.endswith(SUFFIX)]


def read_parts(folder: Folder, table: str, columns: list[str] | None = None) -> dict[str, pa.Table]:
    """The parts of a table by name, all in today's schema (of it `columns`).

    A listing takes time, in which a compaction may delete what it was about to name. So it counts only when every
    part named was there to be read, and no merged part has come meanwhile.
    """
    columns = columns or schemas.schema(table).names
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in range(ATTEMPTS):
            names = part_names(folder)
            tables = list(pool.map(lambda name: parsed(folder, name, table, columns), names))
            found = {name: rows for name, rows in zip(names, tables, strict=True) if rows is not None}
            merged = {name for name in part_names(folder) if name.startswith(MERGED)}
            if len(found) == len(names) and merged <= set(names):
                return found
    raise OSError(f"{folder}: its parts come and go faster than they can be read; try again")


def parsed(folder: Folder, name: str, table: str, columns: list[str]) -> pa.Table | None:
    """One part in today's schema (of it `columns`), None when it is not there; `ValueError` names a damaged one."""
    problem = ""
    # An object store is asked for the size and then for the bytes: a part replaced between the two looks cut short.
    for _ in range(1 if folder.is_local else 3):
        data = folder.read(name)
        if data is None:
            return None
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            found = file.schema_arrow
            refusal = schemas.refusal(table, found)
            if refusal is None:
                if found.equals(schemas.schema(table)):
                    return file.read(columns=columns, use_threads=False).select(columns)
                return schemas.migrated(table, file.read(use_threads=False), columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = (
                f"damaged ({(str(error) or type(error).__name__).splitlines()[0]}); remove it to make its rows again"
            )
            continue
        raise ValueError(f"{folder / name}: {refusal}")
    raise ValueError(f"{folder / name}: {problem}")


def distinct(rows: pa.Table, table: str) -> pa.Table:
    """Each row once, the one written last, in the table's order; needs the columns of `_bookkeeping`."""
    order = ORDERS[table]
    rows = rows.combine_chunks()
    known = rows.select(_bookkeeping(table)).to_pandas()
    known = known.sort_values(schemas.WRITTEN_AT, kind="stable", na_position="first")
    known = known.drop_duplicates(schemas.KEYS[table], keep="last")
    known = known.sort_values(list(order), ascending=list(order.values()), na_position="last")
    return rows.take(pa.array(known.index.to_numpy()))


def _bookkeeping(table: str) -> list[str]:
    """The columns by which duplicates are found and rows are ordered."""
    return list(dict.fromkeys([*schemas.KEYS[table], *ORDERS[table], schemas.WRITTEN_AT]))


def encoded(rows: pa.Table) -> memoryview:
    """Rows as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return memoryview(sink.getvalue())


def write_json(path: Path, row: Mapping[str, Any]) -> None:
    """One row as JSON, written whole."""
    text = json.dumps(dict(row), indent=2, allow_nan=False) + "\n"
    storage.write_local(path.parent, path.name, [text.encode()])
