"""Columns of a trial's row (images, student size), and the student's bundle description."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dfkd_ray import bundles, evaluation
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher, starts
from dfkd_ray.compression import operations, pruning, shape_edits
from dfkd_ray.config import TrialConfig
from dfkd_ray.description import SCHEMA, WITH_EDITS, ShapeEdit
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool
from dfkd_ray.heads import Head
from dfkd_ray.image_sources import mean_term, wall_s
from dfkd_ray.ladder import RECOVERED
from dfkd_ray.models import libraries
from dfkd_ray.trial.images import Rounds


def image_columns(
    pool: Pool, rows: Sequence[Mapping[str, Any]], network: nn.Module, head: Head, runtime: Runtime
) -> dict[str, Any]:
    """Columns about the images: number, hash, the teacher's confidence and class histogram, BN term."""
    logits = evaluation.logits(network, pool.images, runtime)
    return {
        "num_images": len(pool.labels),
        "images_sha256": hashlib.sha256(pool.images.data.cast("B")).hexdigest(),
        "image_confidence": float(head.confidence(logits)),
        "class_histogram": json.dumps(head.histogram(logits)),
        "image_bn": mean_term(rows, "bn"),
    }


def made_columns(rounds: Rounds, pool: Pool, network: nn.Module, head: Head, runtime: Runtime) -> dict[str, Any]:
    """The columns about the images made so far."""
    made = {"synthesis_key": rounds.key, "num_cached_batches": rounds.num_found}
    made |= {"synthesis_wall_s": wall_s(rounds.rows)}
    return made | image_columns(pool, rounds.rows, network, head, runtime)


def pass_columns(rows: Sequence[Mapping[str, Any]], distilled: int) -> dict[str, int | None]:
    """Images through teacher and student: in the synthesis of these rows, and `distilled` images in distillation.

    Batches that are not optimised need none. Null if a batch does not know, as those of an older cache.
    """
    made = [row for row in rows if row.get("num_steps") is not None]
    columns: dict[str, int | None] = {}
    for name in ("num_teacher_passes", "num_student_passes"):
        known = [int(row[name]) for row in made if row.get(name) is not None]
        columns[name] = sum(known) + distilled if len(known) == len(made) else None
    return columns


def test_columns(test: Sequence[Batch] | None) -> dict[str, Any]:
    """Columns about the test set of all accuracies; null without one."""
    about = evaluation.test_set(test) if test else {}
    names = {"test_set": "name", "num_test_images": "num_images", "test_sha256": "sha256"}
    return {column: about.get(name) for column, name in names.items()}


def size_columns(student: nn.Module, pruned: Sequence[str]) -> dict[str, Any]:
    """Sparsity, parameter counts and bytes of a student whose tensors named in `pruned` are stored sparse."""
    state = student.state_dict()
    return {
        "achieved_sparsity": pruning.achieved_sparsity(student),
        "num_parameters": pruning.num_parameters(student),
        "num_nonzero": pruning.num_nonzero(student),
        "dense_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        "stored_bytes": bundles.stored_bytes(state, pruned),
    }


def cost_columns(student: nn.Module, teacher: Teacher) -> dict[str, Any]:
    """Multiplications of a student on the CPU, and parameters and multiplications of its teacher."""
    shape = teacher.info.image_shape
    return {
        "num_macs": operations.num_macs(student, shape),
        "teacher_num_parameters": pruning.num_parameters(teacher.network),
        "teacher_num_macs": operations.num_macs(teacher.network, shape),
    }


def student_info(
    config: TrialConfig, teacher: Teacher, row: Mapping[str, Any], edits: Sequence[ShapeEdit] = ()
) -> bundles.BundleInfo:
    """The student's `teacher.json`: the teacher's, with the student's architecture, shape, accuracy and notes.

    `edits`: the channels that the trial kept of the network that it began with.

    A student of an untrained teacher is untrained too: it has learned random weights.
    The accuracy is the student's own, with a note on the test set, or none. The notes on the teacher's training set
    stay: they say which images were held out, and with which options the set is opened.
    """
    kept = {name: note for name, note in teacher.info.notes.items() if name in ("training", "training_set", "data")}
    notes = {"student_of": teacher.hash, "trial_id": row["trial_id"], "config": config.model_dump(mode="json"), **kept}
    accuracy = row.get(RECOVERED.accuracy)
    if accuracy is not None:
        about = {"name": "test_set", "num_images": "num_test_images", "sha256": "test_sha256"}
        notes["test_set"] = {name: row[column] for name, column in about.items()}
    changes: dict[str, Any] = {"test_accuracy": accuracy, "notes": notes}
    if config.student.architecture is not None:
        architecture, arguments = libraries.structure(config.student.architecture, config.student.arguments)
        changes |= {"architecture": architecture, "arguments": arguments}
    edits = shape_edits.composed(starts.edits_of(config.student, teacher), edits)
    changes |= {"shape_edits": tuple(edits), "schema_version": WITH_EDITS if edits else SCHEMA}
    return teacher.info.model_copy(update=changes)
