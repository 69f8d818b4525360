"""Hashes of configs and what is made of them: ids, keys, columns, and the versions of the algorithms."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dfkd_ray.config.trials import TrialConfig

# Versions of the algorithms. They are part of keys and ids: what another version has made is made again, not found.
# Raise the first with a change after which equal synthesis configs give other images (a method, its seeds, how images
# are stored); the second with one after which equal trials on equal images give other numbers (pruning, BatchNorm
# re-estimation, distillation, evaluation). Not with a config field that is new: that changes keys and ids by itself.
SYNTHESIS_VERSION = 1
TRIAL_VERSION = 1


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted names; empty mappings and lists become JSON text."""
    columns: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            columns |= flat(value, f"{prefix}{key}.")
        else:
            columns[prefix + key] = json.dumps(value) if isinstance(value, Mapping | list) else value
    return columns


def columns_of(config: TrialConfig) -> dict[str, Any]:
    """Dotted field → value: the config's columns in a table. A new student's arguments are one column, as JSON."""
    columns = flat(config.model_dump(mode="json", exclude={"student": {"arguments"}}))
    return columns | {"student.arguments": json.dumps(config.student.arguments, sort_keys=True)}


def stable_hash(data: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of plain data: the same in every process and on every machine."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(config: BaseModel) -> str:
    """Hash of every field of a config: equal configs, equal hashes."""
    return stable_hash(config.model_dump(mode="json"))


def follows(field: str) -> bool:
    """Whether a (dotted) field follows from others, and so tells a reader nothing: the hash of an activation record."""
    return field.rpartition(".")[2] == "record_sha256"


def versions() -> dict[str, int]:
    """The versions of the algorithms, as the columns of a row."""
    return {"trial_version": TRIAL_VERSION, "synthesis_version": SYNTHESIS_VERSION}


def round_key(
    teacher_hash: str, config: BaseModel, domain: str, state_hash: str | None, student: BaseModel | None
) -> str:
    """The key of one round: the synthesis key where it has no state, else hashed with that of its state.

    `student`: the architecture of the student that the round looks at, None where it looks at none.
    """
    key = synthesis_key(teacher_hash, config, domain)
    if state_hash is None:
        return key
    architecture = None if student is None else student.model_dump(mode="json")
    return stable_hash({"of": key, "state": state_hash, "student": architecture})


def seeds_key(teacher_hash: str, config: BaseModel, domain: str = "train", round_number: int = 0) -> str:
    """Hash of the teacher and every field that changes pixels: what the seeds of batches come from.

    `domain` separates the seeds of the held-out reference set from those of training images. The algorithm's version
    is not in it: to raise that alone changes no image. Nor is the student, so that what it changes is not also noise.
    """
    of = {"teacher": teacher_hash, "config": config.model_dump(mode="json"), "domain": domain}
    return stable_hash(of | ({"round": round_number} if round_number else {}))


def synthesis_key(teacher_hash: str, config: BaseModel, domain: str = "train") -> str:
    """Hash of all that decides pixels, `SYNTHESIS_VERSION` included (design: one key, one sequence of batches)."""
    return stable_hash({"of": seeds_key(teacher_hash, config, domain), "version": SYNTHESIS_VERSION})
