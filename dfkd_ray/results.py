"""Result tables as Parquet: schemas declared here with a version, one part file per row and writer, written whole.

Columns are dotted config fields, derived from the config models, and the metrics below. Each column says in its
metadata whether it is deterministic (equal for equal config, seed and machine class) or not (seconds, hosts).
"""

import functools
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dfkd_ray.config import TrialConfig, nested_models

TRIALS_SCHEMA = "dfkd_ray.trials/1"

# name: (type, deterministic, meaning)
METRICS: dict[str, tuple[pa.DataType, bool, str]] = {
    "trial_id": (pa.string(), True, "t- and 12 hex digits of the config's and teacher's hash"),
    "status": (pa.string(), True, "finished or failed"),
    "reason": (pa.string(), True, "why it failed"),
    "teacher_architecture": (pa.string(), True, "the teacher's architecture"),
    "real_data": (pa.bool_(), True, "true where the images distilled on are real: an upper bound, not data-free"),
    "teacher_accuracy": (pa.float64(), True, "test accuracy in [0, 1]; null without test data"),
    "pruned_accuracy": (pa.float64(), True, "after one-shot pruning"),
    "bn_reestimated_accuracy": (pa.float64(), True, "after BatchNorm re-estimation, no training"),
    "recovered_accuracy": (pa.float64(), True, "of the student selected on the reference set"),
    "pruned_agreement": (pa.float64(), True, "share of equal argmax with the teacher on the reference set"),
    "bn_reestimated_agreement": (pa.float64(), True, "the same after BatchNorm re-estimation"),
    "agreement": (pa.float64(), True, "the same for the selected student: what trials are ranked by"),
    "reference_kl": (pa.float64(), True, "KL(teacher || student) on the reference set, nats"),
    "best_step": (pa.int64(), True, "distillation step of the selected student"),
    "num_test_images": (pa.int64(), True, "test images behind the accuracies"),
    "achieved_sparsity": (pa.float64(), True, "zeros over all Conv and Linear weights"),
    "num_parameters": (pa.int64(), True, "of the student"),
    "num_nonzero": (pa.int64(), True, "non-zero parameters of the student"),
    "dense_bytes": (pa.int64(), True, "float32 bytes of the student's state"),
    "stored_bytes": (pa.int64(), True, "bytes of its weights file"),
    "num_images": (pa.int64(), True, "distinct images distilled on"),
    "teacher_hash": (pa.string(), True, "of architecture, normalisation and weights"),
    "synthesis_key": (pa.string(), True, "of teacher hash and synthesis config"),
    "images_sha256": (pa.string(), True, "of all images distilled on, as stored"),
    "image_confidence": (pa.float64(), True, "teacher's mean top probability over the images"),
    "image_bn": (pa.float64(), True, "unweighted BN term at the end, mean over batches"),
    "class_histogram": (pa.string(), True, "teacher's argmax over the images, counts as JSON"),
    "synthesis_wall_s": (pa.float64(), False, "seconds of making the images, summed over batches, cached or not"),
    "reference_wall_s": (pa.float64(), False, "the same for the reference set"),
    "distillation_wall_s": (pa.float64(), False, "seconds of distillation"),
    "wall_s": (pa.float64(), False, "seconds of the whole trial"),
    "num_cached_batches": (pa.int64(), False, "batches found in the cache"),
    "package_version": (pa.string(), False, "of dfkd_ray"),
    "commit": (pa.string(), False, "of dfkd_ray, where known"),
    "torch_version": (pa.string(), False, ""),
    "ray_version": (pa.string(), False, "null without Ray"),
    "numerics": (pa.string(), False, "device model or instruction set, torch version"),
    "host": (pa.string(), False, ""),
}


def arrow_type(annotation: Any) -> pa.DataType:
    """The column type of a config field."""
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [part for part in typing.get_args(annotation) if part is not type(None)]
    option = options[0]
    if typing.get_origin(option) is typing.Annotated:
        option = typing.get_args(option)[0]
    return {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}.get(option, pa.string())


def config_columns(model: type[BaseModel], prefix: str = "") -> dict[str, pa.DataType]:
    """Dotted field names of a config model and their types; fields of a union's members share one column by name."""
    columns: dict[str, pa.DataType] = {}
    for name, field in model.model_fields.items():
        nested = nested_models(field.annotation)
        if nested:
            for member in nested:
                columns |= {k: v for k, v in config_columns(member, f"{prefix}{name}.").items() if k not in columns}
        else:
            columns[prefix + name] = arrow_type(field.annotation)
    return columns


@functools.cache
def trials_schema() -> pa.Schema:
    """The schema of the `trials` table."""
    fields = [
        pa.field(name, kind, metadata={"deterministic": str(fixed).lower(), "meaning": meaning})
        for name, (kind, fixed, meaning) in METRICS.items()
    ]
    # The device is a wish; what it came to is in `numerics`.
    fields += [
        pa.field(name, kind, metadata={"deterministic": str(name != "device").lower(), "meaning": "config"})
        for name, kind in config_columns(TrialConfig).items()
    ]
    return pa.schema(fields, metadata={"dfkd_ray.schema": TRIALS_SCHEMA})


def deterministic_columns() -> list[str]:
    """Names of the columns by which two `trials` tables are called identical."""
    return [f.name for f in trials_schema() if (f.metadata or {}).get(b"deterministic") == b"true"]


def write_trials(folder: Path, rows: Sequence[Mapping[str, Any]], part: str) -> Path:
    """Write rows as `trials/<part>.parquet` under `folder`, whole. Raises `KeyError` for a column not in the schema."""
    schema = trials_schema()
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise KeyError(f"columns not in schema {TRIALS_SCHEMA}: {sorted(unknown)}")
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    target = folder / "trials" / f"{part}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def read_trials(folder: Path) -> pd.DataFrame:
    """The `trials` table of a results folder, one row a trial, best agreement first, failed ones last."""
    parts = sorted((folder / "trials").glob("*.parquet"))
    if not parts:
        raise ValueError(f"{folder}: no trials table there (expected {folder / 'trials'}/*.parquet)")
    frames = []
    for part in parts:
        try:
            frames.append(pq.read_table(part, schema=trials_schema()).to_pandas())
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{part}: damaged ({str(error).splitlines()[0]}); remove it to run that trial again"
            ) from None
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.drop_duplicates("trial_id", keep="last")
    order = ["agreement", "reference_kl", "trial_id"]
    return frame.sort_values(order, ascending=[False, True, True], na_position="last").reset_index(drop=True)


def write_json(path: Path, row: Mapping[str, Any]) -> None:
    """One row as JSON, written whole."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(json.dumps(dict(row), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
