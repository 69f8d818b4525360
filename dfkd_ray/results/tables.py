"""Reads, writes and compacts the tables in a results place.

A part is a small file with one writer, written atomically. Compaction writes many parts into one file and then deletes
them. A crash between the two leaves duplicate rows, which readers drop. Compaction never touches a part that may be
written again (the part of an unfinished trial), so no row can be lost in a race.
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
LEFTOVER_S = 600.0  # a part is written in seconds: an older temporary file belongs to no running writer
NUM_THREADS = 16  # for reading: parts are small, and on an object store each costs a network round trip
ATTEMPTS = 20
ADVICE = "remove it to make its rows again"  # for a damaged part
FINAL = ("finished", "stopped")  # statuses of trials that are not run again
# "Best" means closest to the teacher on the reference set, never test accuracy.
ORDERS: dict[str, dict[str, bool]] = {
    "trials": {**schemas.BEST_FIRST, "trial_id": True},
    "epochs": {"trial_id": True, "step": True},
    "synthesis": {"synthesis_key": True, "batch_index": True},
}


def read(place: Where, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table of a place, all columns or some, without duplicates, in the table's order.

    `trials`: `BEST_FIRST` (lowest `reference_kl` within a version), failed last. `epochs`: by trial and step.
    `synthesis`: by key and batch index. `ValueError` if the table or a column does not exist, or if a part is damaged
    or of a newer version.
    """
    schemas.known(table, columns or ())
    frame = read_arrow(place, table, columns).to_pandas()
    return frame if columns is None else frame[list(columns)]


def read_arrow(place: Where, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """`read` as an Arrow table, whose whole numbers are exact; with `columns` also those of `_bookkeeping`."""
    needed = None if columns is None else list(dict.fromkeys([*columns, *_bookkeeping(table)]))
    folder = storage.folder(place) / table
    parts = read_parts(folder, table, needed)
    if not parts:
        raise ValueError(f"{storage.folder(place)}: no {table} table there (expected {folder}/*{SUFFIX})")
    return distinct(pa.concat_tables(parts.values()), table)


def is_place(place: Where) -> bool:
    """Whether a place has one of our tables: a part with one of our names, or a readable first part."""
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
    """The rows of one part; None if it does not exist (any more)."""
    rows = parsed(storage.folder(place) / table, part + SUFFIX, table, schemas.schema(table).names)
    return None if rows is None else rows.to_pandas()


def write(place: Where, table: str, rows: Sequence[Mapping[str, Any]], part: str) -> None:
    """Write rows as `<table>/<part>.parquet`, atomically, replacing an existing part.

    Missing columns and numbers that are not finite become null. `KeyError` for a column not in the schema; an Arrow
    error for a value that does not fit (`kept` and `writable` make rows fit); `OSError` from disk or network.
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
    """Write rows of `synthesis`, one part per key and number of batches, unless the part exists.

    Trials that share a key would write the same part; only the first one does.
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
    """The ids of trials with a final row: finished or stopped early."""
    root = storage.folder(place)
    if not part_names(root / "trials"):
        return set()
    rows = read(root, "trials", ["trial_id", "status"])
    final = rows.loc[rows["status"].isin(FINAL) & rows["trial_id"].notna()]  # a part from elsewhere may lack an id
    return set(final["trial_id"])


def compact(place: Where) -> int:
    """Merge the parts of each table into one file; returns the number of merged parts.

    It may run during trials, and twice at the same time. Parts of unfinished trials stay, because they may be written
    again. Rows of older versions are migrated.
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
    """Whether a part will not be written again, as it is not the part of an unfinished trial."""
    own = name.removesuffix(SUFFIX)
    if table == "synthesis" or own in finished:
        return True
    return own not in rows.column("trial_id").to_pylist()


def remove_leftovers(folder: Folder) -> None:
    """Remove temporary files of killed writers."""
    for name, (_, changed) in folder.sizes().items():
        if storage.is_part(name) and changed is not None and time.time() - changed > LEFTOVER_S:
            folder.remove(name)


def part_names(folder: Folder) -> list[str]:
    """Names of the parts in a table's folder, sorted."""
    return [name for name in folder.names() if name.endswith(SUFFIX)]


def read_parts(folder: Folder, table: str, columns: list[str] | None = None) -> dict[str, pa.Table]:
    """Name → part of a table, in today's schema, restricted to `columns`.

    A compaction may delete parts while they are listed. So a listing is used only if all listed parts could be read and
    no merged part has appeared meanwhile; otherwise it is repeated.
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


def parsed(folder: Folder, name: str, table: str, columns: list[str], advice: str = ADVICE) -> pa.Table | None:
    """One part in today's schema, restricted to `columns`; None if it does not exist.

    `ValueError`, with `advice`, if it is damaged.
    """
    problem = ""
    # An object store returns size and bytes in two requests: a part replaced in between looks truncated.
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
            problem = f"damaged ({(str(error) or type(error).__name__).splitlines()[0]}); {advice}"
            continue
        raise ValueError(f"{folder / name}: {refusal}")
    raise ValueError(f"{folder / name}: {problem}")


def distinct(rows: pa.Table, table: str) -> pa.Table:
    """The rows without duplicates (the last written stays), in the table's order; needs the `_bookkeeping` columns."""
    order = ORDERS[table]
    rows = rows.combine_chunks()
    known = rows.select(_bookkeeping(table)).to_pandas()
    known = known.sort_values(schemas.WRITTEN_AT, kind="stable", na_position="first")
    known = known.drop_duplicates(schemas.KEYS[table], keep="last")
    if table == "trials":  # a failed trial of the newest version comes after what an older one has found
        has_result = known["reference_kl"].notna() | known["agreement"].notna()
        known = known.assign(**{name: known[name].where(has_result) for name in schemas.BEST_FIRST})
    known = known.sort_values(list(order), ascending=list(order.values()), na_position="last")
    return rows.take(pa.array(known.index.to_numpy()))


def _bookkeeping(table: str) -> list[str]:
    """The columns for finding duplicates and for sorting."""
    return list(dict.fromkeys([*schemas.KEYS[table], *ORDERS[table], schemas.WRITTEN_AT]))


def encoded(rows: pa.Table) -> memoryview:
    """Rows as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return memoryview(sink.getvalue())


def write_json(path: Path, row: Mapping[str, Any]) -> None:
    """Write one row as JSON, atomically."""
    text = json.dumps(dict(row), indent=2, allow_nan=False) + "\n"
    storage.write_local(path.parent, path.name, [text.encode()])
