"""Schemas of the tables `trials`, `epochs` and `synthesis`: columns, versions, migration of older rows.

Columns are the dotted config fields, derived from the config models, and the metrics below. The metadata of a column
says whether it is deterministic (equal for equal config, seed and machine class) or not (seconds, hosts).
"""

import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from dfkd_ray.config import NEWER_FIELDS, TrialConfig, nested_models
from dfkd_ray.config.methods import METHODS, term_columns
from dfkd_ray.ladder import RUNGS, STUDENTS

Columns = dict[str, tuple[pa.DataType, bool, str]]
SCHEMA = b"dfkd_ray.schema"

# One entry per step from a version to the next: the columns renamed in it. Columns added with a version or a config
# field are null in older rows. A new config field does not raise the version, a new metric does.
RENAMED: dict[str, list[Mapping[str, str]]] = {
    # 2: written_at_s; 3: trial_version, synthesis_version; 4: selected, warnings, test_set, test_sha256; 5: the rung
    # "reconstructed"; 6: num_macs, teacher_num_parameters, teacher_num_macs, channels; 7: the rung "quantised",
    # latency, num_kept_zeros; 8: num_teacher_passes, num_student_passes
    "trials": [{}, {}, {}, {}, {}, {}, {}],
    "epochs": [],
    # 2: written_at_s; 3: record; 4: synthesis_version; 5: round; 6: num_teacher_passes, num_student_passes
    "synthesis": [{}, {}, {}, {}, {}],
}
# The primary key of each table: of rows with equal keys, readers keep the one written last.
KEYS = {"trials": ["trial_id"], "epochs": ["trial_id", "step"], "synthesis": ["synthesis_key", "batch_index"]}
WRITTEN_AT = "written_at_s"
# The seeds that differ between repetitions of a trial.
SEEDS = ("synthesis.seed", "distillation.seed")
# The order of trials, nulls last: column -> ascending. Numbers on other reference images are no better or worse, so
# trials of the newest version come first, mixed images before plain ones, and the lowest KL within each.
REFERENCE_KIND = {"trial_version": False, "reference.mixed": False, "reference.mixed_with": True}
BEST_FIRST = {**REFERENCE_KIND, "reference_kl": True, "agreement": False}

SYNTHESIS_VERSION_MEANING = "of the algorithms that make images; null in rows from before it was counted"
PASSES = "in synthesis and distillation, forward and backward as one; null where a batch does not know its own"
WRITING: Columns = {WRITTEN_AT: (pa.float64(), False, "when the row was written, seconds since 1970")}

# name: (type, deterministic, meaning)
METRICS: Columns = {
    "trial_id": (pa.string(), True, "t- and 12 hex digits of the config's and teacher's hash"),
    "trial_version": (pa.int64(), True, "of the trial's algorithms; null in rows from before it was counted"),
    "synthesis_version": (pa.int64(), True, SYNTHESIS_VERSION_MEANING),
    "status": (pa.string(), True, "finished, failed, or stopped: early, by how it compared with others"),
    "reason": (pa.string(), True, "why it failed"),
    "teacher_architecture": (pa.string(), True, "the teacher's architecture"),
    "real_data": (pa.bool_(), True, "true where the images distilled on are real: an upper bound, not data-free"),
    **{rung.accuracy: (pa.float64(), True, rung.accuracy_meaning) for rung in RUNGS},
    **{str(rung.agreement): (pa.float64(), True, str(rung.agreement_meaning)) for rung in STUDENTS},
    "reference_kl": (pa.float64(), True, "KL(teacher || student) on the reference set, nats"),
    "best_step": (pa.int64(), True, "distillation step of the selected student; 0: from before the first"),
    "selected": (pa.string(), True, "the rung of the selected student, the stem of its columns"),
    "warnings": (pa.string(), True, "what looks wrong, and what to change; null where nothing does"),
    "test_set": (pa.string(), True, "name of the test set behind the accuracies; null without one"),
    "num_test_images": (pa.int64(), True, "test images behind the accuracies"),
    "test_sha256": (pa.string(), True, "of the test images, as stored, and their labels"),
    "achieved_sparsity": (
        pa.float64(),
        True,
        "zeros over all Conv and Linear weights; with pruning.structure=channels the removed share of all parameters",
    ),
    "num_parameters": (pa.int64(), True, "of the student"),
    "num_macs": (pa.int64(), True, "multiply-accumulate operations of the student's Conv and Linear layers, an image"),
    "teacher_num_parameters": (pa.int64(), True, "of the teacher"),
    "teacher_num_macs": (pa.int64(), True, "as num_macs, of the teacher"),
    "channels": (pa.string(), True, "JSON: layer -> [channels kept, before]; null where none were removed"),
    "num_nonzero": (pa.int64(), True, "non-zero parameters of the student"),
    "num_kept_zeros": (pa.int64(), True, "zeros of student.weights that stayed zero; null without such a file"),
    "dense_bytes": (pa.int64(), True, "float32 bytes of the student's state"),
    "stored_bytes": (pa.int64(), True, "bytes of its weights file"),
    "quantised_kl": (pa.float64(), True, "as reference_kl, of the int8 ONNX file; null without int8"),
    "int8_file_bytes": (pa.int64(), True, "bytes of the student's ONNX file with int8; null without int8"),
    "float_file_bytes": (pa.int64(), True, "bytes of its ONNX file in float32; null without int8"),
    "int8_steps": (pa.int64(), True, "steps of distillation through fake quantisation of that file; 0 without"),
    "num_images": (pa.int64(), True, "distinct images distilled on"),
    "teacher_hash": (pa.string(), True, "of architecture, normalisation and weights"),
    "synthesis_key": (pa.string(), True, "of teacher hash and synthesis config"),
    "images_sha256": (pa.string(), True, "of all images distilled on, as stored"),
    "num_teacher_passes": (pa.int64(), True, f"images through the teacher, {PASSES}"),
    "num_student_passes": (pa.int64(), True, f"images through the student, {PASSES}"),
    "image_confidence": (pa.float64(), True, "teacher's mean top probability over the images"),
    "image_bn": (pa.float64(), True, "unweighted BN term at the end, mean over batches"),
    "class_histogram": (pa.string(), True, "teacher's argmax over the images, counts as JSON"),
    "synthesis_wall_s": (pa.float64(), False, "seconds of making the images, summed over batches, cached or not"),
    "reference_wall_s": (pa.float64(), False, "the same for the reference set"),
    "reconstruction_wall_s": (pa.float64(), False, "seconds of layer-wise reconstruction; null where it is left out"),
    "distillation_wall_s": (pa.float64(), False, "seconds of distillation, all attempts, without waiting for images"),
    "quantisation_wall_s": (pa.float64(), False, "seconds of writing and measuring int8; null without it"),
    "wall_s": (pa.float64(), False, "seconds of the trial: of its last attempt, and of distillation before it"),
    "latency_ratio": (
        pa.float64(),
        False,
        "how many times as fast as the teacher a batch is, of alternating runs; null in the teacher's shape",
    ),
    "int8_latency_ratio": (pa.float64(), False, "of its int8 file to the teacher in float32, both on ONNX Runtime"),
    "latency_s": (pa.float64(), False, "seconds of a batch, median, as section latency says"),
    "teacher_latency_s": (pa.float64(), False, "the same of the teacher"),
    "latency_warning": (pa.string(), False, "what looks wrong in these measurements; null where nothing does"),
    "num_cached_batches": (pa.int64(), False, "batches that were there: in the cache, or made for another trial"),
    "fleet_call_s": (pa.float64(), False, "seconds inside calls to the synthesis fleet, waiting for images excluded"),
    "fleet_wait_s": (pa.float64(), False, "seconds of waiting for images that were still being made"),
    "package_version": (pa.string(), False, "of dfkd_ray"),
    "commit": (pa.string(), False, "of dfkd_ray, where known"),
    "torch_version": (pa.string(), False, ""),
    "ray_version": (pa.string(), False, "null without Ray"),
    "numerics": (pa.string(), False, "device model or instruction set, torch version"),
    "host": (pa.string(), False, ""),
    **WRITING,
}

# One row per evaluation on the reference set, the first before the first step.
EPOCHS: Columns = {
    "trial_id": (pa.string(), True, "as in trials"),
    "step": (pa.int64(), True, "distillation steps taken"),
    "agreement": (pa.float64(), True, "share of equal argmax with the teacher on the reference set"),
    "reference_kl": (pa.float64(), True, "KL(teacher || student) on the reference set, nats"),
    "loss": (pa.float64(), True, "what was minimised, mean over the steps since the look before"),
    "kl": (pa.float64(), True, "unweighted distillation term, the same mean"),
    "label": (pa.float64(), True, "unweighted label loss; null where it has no weight"),
    "attention": (pa.float64(), True, "unweighted attention term; null where it has no weight"),
    "feature": (pa.float64(), True, "unweighted feature term; null where it has no weight"),
    "learning_rate": (pa.float64(), True, "of the last step; null before the first"),
    "sparsity": (pa.float64(), True, "zeros over all Conv and Linear weights of the student, as it then was"),
    **WRITING,
}

# One row per batch that any trial has used.
SYNTHESIS: Columns = {
    "synthesis_key": (pa.string(), True, "of teacher hash, synthesis config and domain"),
    "batch_index": (pa.int64(), True, "which batch of the key"),
    "round": (pa.int64(), True, "of a method that goes by rounds, from 0; 0 for others"),
    "synthesis_version": (pa.int64(), True, SYNTHESIS_VERSION_MEANING),
    "teacher_hash": (pa.string(), True, "of architecture, normalisation and weights"),
    "domain": (pa.string(), True, "train, or reference for the held-out set"),
    "method": (pa.string(), True, f"synthesis method: {', '.join(METHODS)}"),
    "num_images": (pa.int64(), True, "images in the batch"),
    "images_sha256": (pa.string(), True, "of its images as stored"),
    **{name: (pa.float64(), True, meaning) for name, meaning in term_columns().items()},
    "confidence": (pa.float64(), True, "teacher's mean top probability"),
    "label_agreement": (pa.float64(), True, "share of images that the teacher sees as their label"),
    "class_histogram": (pa.string(), True, "teacher's argmax, counts as JSON"),
    "num_steps": (pa.int64(), True, "optimiser steps taken"),
    "num_teacher_passes": (pa.int64(), True, "images through the teacher while it was made"),
    "num_student_passes": (pa.int64(), True, "the same of the student"),
    "num_attempts": (pa.int64(), True, "1, or more where the loss had turned NaN"),
    "wall_s": (pa.float64(), False, "seconds of making it"),
    "host": (pa.string(), False, "where it was made"),
    "numerics": (pa.string(), False, "device model or instruction set, torch version"),
    **WRITING,
}

TABLES: dict[str, Columns] = {"trials": METRICS, "epochs": EPOCHS, "synthesis": SYNTHESIS}


def arrow_type(annotation: Any) -> pa.DataType:
    """The column type of a config field."""
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [part for part in typing.get_args(annotation) if part is not type(None)]
    option = options[0]
    if typing.get_origin(option) is typing.Annotated:
        option = typing.get_args(option)[0]
    if typing.get_origin(option) is typing.Literal:
        option = type(typing.get_args(option)[0])
    return {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}.get(option, pa.string())


def config_columns(model: type[BaseModel], prefix: str = "") -> dict[str, pa.DataType]:
    """Dotted field name → column type of a config model; equal names in a union's members share one column."""
    columns: dict[str, pa.DataType] = {}
    for name, field in model.model_fields.items():
        nested = nested_models(field.annotation)
        if nested:
            for member in nested:
                columns |= {k: v for k, v in config_columns(member, f"{prefix}{name}.").items() if k not in columns}
        else:
            columns[prefix + name] = arrow_type(field.annotation)
    return columns


def field(name: str, kind: pa.DataType, deterministic: bool, meaning: str) -> pa.Field:
    """An Arrow field with its meaning and whether it is deterministic, as metadata."""
    return pa.field(name, kind, metadata={"deterministic": str(deterministic).lower(), "meaning": meaning})


def version(table: str) -> int:
    """Today's version of a table."""
    return len(RENAMED[table]) + 1


def schema(table: str) -> pa.Schema:
    """Today's schema of a table; `ValueError` for an unknown name."""
    if table not in TABLES:
        raise ValueError(f"table {table!r}: expected one of {', '.join(TABLES)}")
    return _schema(table, version(table))


@functools.cache
def _schema(table: str, version: int) -> pa.Schema:
    fields = [field(name, *column) for name, column in TABLES[table].items()]
    if table == "trials":
        # `device` is what was requested; `numerics` has the device that was used.
        columns = config_columns(TrialConfig).items()
        fields += [field(name, kind, name != "device", "config") for name, kind in columns]
    return pa.schema(fields, metadata={SCHEMA: f"dfkd_ray.{table}/{version}"})


def deterministic_columns(table: str = "trials") -> list[str]:
    """Names of the deterministic columns, by which two tables are compared."""
    return [f.name for f in schema(table) if (f.metadata or {}).get(b"deterministic") == b"true"]


def known(table: str, columns: Iterable[str]) -> None:
    """`ValueError`, with a suggestion, for a name that is not a column of the table."""
    names = schema(table).names
    for name in columns:
        if name not in names:
            raise ValueError(f"{name!r}: no column of the table {table}{close_to(name, names)}")


def close_to(name: str, names: Iterable[str]) -> str:
    """A "did you mean" hint for a message, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def version_of(table: str, found: pa.Schema) -> int | None:
    """The version in a file's schema; None if the file is not a part of this table."""
    name, _, number = (found.metadata or {}).get(SCHEMA, b"").decode(errors="replace").partition("/")
    return int(number) or None if name == f"dfkd_ray.{table}" and number.isdigit() else None


def refusal(table: str, found: pa.Schema) -> str | None:
    """Why a file with this schema cannot be read as today's version; None if it can."""
    number, today = version_of(table, found), version(table)
    if number is None:
        return f"no part of a {table} table of dfkd_ray; it does not belong there"
    if number > today:
        return (
            f"written by a newer dfkd_ray (version {number} of {table}, this one reads up to {today}); update this one"
        )
    unknown = sorted(set(renamed(table, number, found.names)) - set(schema(table).names))
    if unknown:
        return f"written by another dfkd_ray, this one does not know its columns {', '.join(unknown)}; update this one"
    return None


def renamed(table: str, number: int, names: list[str]) -> list[str]:
    """Today's names of the columns of an older version."""
    for step in RENAMED[table][number - 1 :]:
        names = [step.get(name, name) for name in names]
    return names


def migrated(table: str, rows: pa.Table, columns: list[str]) -> pa.Table:
    """Rows of an older version in today's schema, restricted to `columns`.

    What is missing is null, or the default of a newer section.
    """
    rows = rows.rename_columns(renamed(table, version_of(table, rows.schema) or 1, rows.column_names))
    today = schema(table)
    fields = [today.field(name) for name in columns]
    have = set(rows.column_names)

    def missing(field: pa.Field) -> pa.Array:
        value = NEWER_FIELDS.get(field.name)  # null would look like another setting
        return pa.nulls(len(rows), field.type) if value is None else pa.repeat(pa.scalar(value, field.type), len(rows))

    arrays = [rows.column(f.name).cast(f.type) if f.name in have else missing(f) for f in fields]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=today.metadata))
