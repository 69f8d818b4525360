"""Looks up the final row of one trial. A failed later attempt never replaces a final row."""

from typing import Any

import pyarrow as pa

from dfkd_ray import storage
from dfkd_ray.results import schemas, tables
from dfkd_ray.storage import Where


def final_row(place: Where, trial_id: str, merged: bool = True) -> dict[str, Any] | None:
    """The row of a trial that has finished or was stopped early; None if there is none.

    It is searched in the trial's own part and, with `merged`, in compacted files. A damaged part counts as empty. An
    error of disk or network is an `OSError`.
    """
    folder = storage.folder(place) / "trials"
    names = [f"{trial_id}{tables.SUFFIX}"]
    if merged:
        names += [name for name in folder.names() if name.startswith(tables.MERGED)]
    for name in names:
        try:
            rows = tables.parsed(folder, name, "trials", schemas.schema("trials").names)
        except ValueError:
            continue
        row = None if rows is None else newest(rows, trial_id)
        if row is not None and row["status"] in tables.FINAL:
            return row
    return None


def newest(rows: pa.Table, trial_id: str) -> dict[str, Any] | None:
    """The most recently written row of a trial."""
    own = [name == trial_id for name in rows.column("trial_id").to_pylist()]
    found = rows.filter(pa.array(own, pa.bool_())).to_pylist()
    return max(found, key=lambda row: row[schemas.WRITTEN_AT] or 0.0, default=None)
