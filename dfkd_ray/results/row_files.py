"""Rows of trials as one small Parquet file, from which the tables of documents are rendered.

Equal rows give equal bytes (with the same pyarrow). A file holds what the rows say of their trials, and nothing of
where they ran: the column `host` is left out, and so are the folders of absolute paths in all texts (of `/a/b/net`
`net` stays). Columns that say nothing are left out too: reading gives null, or the default of a field that came later.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dfkd_ray import storage
from dfkd_ray.config import NEWER_FIELDS
from dfkd_ray.results import schemas, tables

TABLE = "trials"
LEFT_OUT = ("host",)
# Of an absolute path that begins a word, or of one from the home folder.
FOLDERS = r"(^|[\s'\"(=,\[])(?:file://)?~?/(?:[^\s/:'\"]+/)+"
KEPT = r"\1"


def packed(rows: pa.Table) -> memoryview:
    """Rows of `trials`, in today's schema and the table's order, as the bytes of a rows file."""
    names = [name for name in rows.column_names if name not in LEFT_OUT and says_something(rows, name)]
    arrays = [without_folders(rows.column(name)) for name in names]
    fields = [pa.field(name, rows.schema.field(name).type) for name in names]
    wanted = pa.schema(fields, metadata=schemas.schema(TABLE).metadata)
    return compressed(pa.Table.from_arrays(arrays, schema=wanted).combine_chunks())


def compressed(table: pa.Table) -> memoryview:
    """A table as the bytes of a small Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return memoryview(sink.getvalue())


def says_something(rows: pa.Table, name: str) -> bool:
    """Whether a column would be read back as something else if it were left out."""
    absent = NEWER_FIELDS.get(name)
    return any(value != absent for value in rows.column(name).to_pylist())


def without_folders(column: Any) -> Any:
    """A column of text without the folders of absolute paths; another column as it is."""
    if column.type != pa.string():
        return column
    return pc.call_function("replace_substring_regex", [column], pc.ReplaceSubstringOptions(FOLDERS, KEPT))


def read(paths: Sequence[Path]) -> pa.Table:
    """The trials of one or more rows files, in today's schema and the table's order.

    `ValueError` if a file is missing or damaged, or if a trial is in two of them.
    """
    names = schemas.schema(TABLE).names
    found, seen = [], set()
    for path in paths:
        folder = storage.folder(path.absolute().parent)
        rows = tables.parsed(folder, path.name, TABLE, names, "write it again from its results place")
        if rows is None:
            raise ValueError(f"{path}: no such file of rows")
        own = set(rows.column("trial_id").to_pylist())
        if twice := sorted(map(str, seen & own)):
            raise ValueError(f"{path}: trial {twice[0]} is in another of these files too, and would count twice")
        seen |= own
        found.append(rows)
    return tables.distinct(pa.concat_tables(found), TABLE)


def is_own(folder: storage.Folder, name: str) -> bool:
    """Whether a file holds rows of trials, as a rows file or a part of a table."""
    try:
        return tables.parsed(folder, name, TABLE, ["trial_id"]) is not None
    except ValueError:
        return False
