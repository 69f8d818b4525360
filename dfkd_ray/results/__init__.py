"""Result tables as Parquet in a place: a folder, or any URI that pyarrow opens.

A place has the folders `trials/`, `epochs/` and `synthesis/`. Each holds small part files; a part has one writer and is
written atomically. A crash leaves the old or the new rows, never half a row. `compact` merges many parts into one file.
"""

from dfkd_ray.results.rows import kept, unfit, writable
from dfkd_ray.results.schemas import METRICS, REFERENCE_KIND, SEEDS, TABLES, deterministic_columns, schema, version
from dfkd_ray.results.selecting import fold_seeds, mixed, select, varied_fields
from dfkd_ray.results.tables import (
    FINAL,
    compact,
    finished_ids,
    is_place,
    read,
    read_part,
    write,
    write_batches,
    write_json,
)

__all__ = [
    "FINAL",
    "METRICS",
    "REFERENCE_KIND",
    "SEEDS",
    "TABLES",
    "compact",
    "deterministic_columns",
    "finished_ids",
    "fold_seeds",
    "is_place",
    "kept",
    "mixed",
    "read",
    "read_part",
    "schema",
    "select",
    "unfit",
    "varied_fields",
    "version",
    "writable",
    "write",
    "write_batches",
    "write_json",
]
