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
SYNTHESIS_SCHEMA = "dfkd_ray.synthesis/1"

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
    "num_cached_batches": (pa.int64(), False, "batches that were there: in the cache, or made for another trial"),
    "fleet_call_s": (pa.float64(), False, "seconds inside calls to the synthesis fleet, waiting for images excluded"),
    "fleet_wait_s": (pa.float64(), False, "seconds of waiting for images that were still being made"),
    "package_version": (pa.string(), False, "of dfkd_ray"),
    "commit": (pa.string(), False, "of dfkd_ray, where known"),
    "torch_version": (pa.string(), False, ""),
    "ray_version": (pa.string(), False, "null without Ray"),
    "numerics": (pa.string(), False, "device model or instruction set, torch version"),
    "host": (pa.string(), False, ""),
}

# One row per batch that any trial has used.
SYNTHESIS: dict[str, tuple[pa.DataType, bool, str]] = {
    "synthesis_key": (pa.string(), True, "of teacher hash, synthesis config and domain"),
    "batch_index": (pa.int64(), True, "which batch of the key"),
    "teacher_hash": (pa.string(), True, "of architecture, normalisation and weights"),
    "domain": (pa.string(), True, "train, or reference for the held-out set"),
    "method": (pa.string(), True, "synthesis method"),
    "num_images": (pa.int64(), True, "images in the batch"),
    "images_sha256": (pa.string(), True, "of its images as stored"),
    "label": (pa.float64(), True, "unweighted label loss of the stored images"),
    "bn": (pa.float64(), True, "unweighted BatchNorm statistics term"),
    "tv": (pa.float64(), True, "unweighted total variation"),
    "l2": (pa.float64(), True, "mean squared normalised pixel"),
    "confidence": (pa.float64(), True, "teacher's mean top probability"),
    "label_agreement": (pa.float64(), True, "share of images that the teacher sees as their label"),
    "class_histogram": (pa.string(), True, "teacher's argmax, counts as JSON"),
    "num_steps": (pa.int64(), True, "optimiser steps taken"),
    "num_attempts": (pa.int64(), True, "1, or more where the loss had turned NaN"),
    "wall_s": (pa.float64(), False, "seconds of making it"),
    "host": (pa.string(), False, "where it was made"),
    "numerics": (pa.string(), False, "device model or instruction set, torch version"),
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


def fields_of(columns: Mapping[str, tuple[pa.DataType, bool, str]]) -> list[pa.Field]:
    """Arrow fields with what they mean and whether they are deterministic."""
    return [
        pa.field(name, kind, metadata={"deterministic": str(fixed).lower(), "meaning": meaning})
        for name, (kind, fixed, meaning) in columns.items()
    ]


@functools.cache
def trials_schema() -> pa.Schema:
    """The schema of the `trials` table."""
    # The device is a wish; what it came to is in `numerics`.
    fields = [
        pa.field(name, kind, metadata={"deterministic": str(name != "device").lower(), "meaning": "config"})
        for name, kind in config_columns(TrialConfig).items()
    ]
    return pa.schema(fields_of(METRICS) + fields, metadata={"dfkd_ray.schema": TRIALS_SCHEMA})


@functools.cache
def synthesis_schema() -> pa.Schema:
    """The schema of the `synthesis` table."""
    return pa.schema(fields_of(SYNTHESIS), metadata={"dfkd_ray.schema": SYNTHESIS_SCHEMA})


def deterministic_columns(schema: pa.Schema | None = None) -> list[str]:
    """Names of the columns by which two tables (default: `trials`) are called identical."""
    return [f.name for f in schema or trials_schema() if (f.metadata or {}).get(b"deterministic") == b"true"]


def write_trials(folder: Path, rows: Sequence[Mapping[str, Any]], part: str) -> Path:
    """Write rows as `trials/<part>.parquet` under `folder`, whole. Raises `KeyError` for a column not in the schema."""
    return write_part(folder / "trials" / f"{part}.parquet", rows, trials_schema())


def write_synthesis(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of batches under `synthesis/`, a file per key and number of batches, where not there already.

    Trials that share a key would write the same file: whoever comes first does.
    """
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_key.setdefault(row["synthesis_key"], []).append(row)
    for key, own in by_key.items():
        target = folder / "synthesis" / f"k-{key[:16]}-{len(own)}.parquet"
        if not target.exists():
            write_part(target, own, synthesis_schema())


def write_part(target: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
    """Write rows as one Parquet file, whole: hidden temporary name, fsync, rename."""
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise KeyError(
            f"columns not in schema {(schema.metadata or {})[b'dfkd_ray.schema'].decode()}: {sorted(unknown)}"
        )
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def read_synthesis(folder: Path) -> pd.DataFrame:
    """The `synthesis` table of a results folder: a row per batch, by key and index."""
    parts = sorted((folder / "synthesis").glob("*.parquet"))
    if not parts:
        raise ValueError(f"{folder}: no synthesis table there (expected {folder / 'synthesis'}/*.parquet)")
    frame = pd.concat([pq.read_table(part, schema=synthesis_schema()).to_pandas() for part in parts])
    order = ["synthesis_key", "batch_index"]
    return frame.drop_duplicates(order).sort_values(order).reset_index(drop=True)


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
