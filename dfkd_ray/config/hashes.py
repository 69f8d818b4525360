"""Hashes of configs for trial ids, synthesis keys and batch seeds; versions of the algorithms; columns of a config."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dfkd_ray.config.trials import LatencyConfig, TrialConfig

# Versions of the algorithms. They are part of keys and ids, so results of another version are not found but recomputed.
# Raise SYNTHESIS_VERSION with a change that gives other images for the same synthesis config (a method, its seeds, the
# storage of images). Raise TRIAL_VERSION with a change that gives other numbers for the same trial on the same images
# (pruning, BatchNorm re-estimation, reconstruction, distillation, evaluation). Raise neither for a new config field: it
# changes keys and ids by itself.
SYNTHESIS_VERSION = 2  # 2: with more classes than images in a batch, labels in a random order
# 2: distils on distillation.num_images alone; plain pruning is a candidate. 3: the lowest KL divergence selects; layers
# are reconstructed. 4: in reconstruction, residual sums are fitted as such, and layers before BatchNorm are centred
# (so they are in trials of version 3 from commit d845e3a on: the number was raised late). 5: the weight of BatchNorm
# statistics goes by the teacher where a config gives none, also in the reference set; a sweep file does not show it.
# 6: the first random weights of a new student are no result (all other trials give the numbers of version 5).
TRIAL_VERSION = 6

# A field that goes by the teacher where it is not set. The reference set is one for each teacher.
OF_TEACHER = "reference.synthesis.bn_weight"
TRIAL_ID = re.compile(r"t-[0-9a-f]{12}")


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted name → value; empty mappings and all lists become JSON text."""
    columns: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            columns |= flat(value, f"{prefix}{key}.")
        else:
            columns[prefix + key] = json.dumps(value) if isinstance(value, Mapping | list) else value
    return columns


def columns_of(config: TrialConfig) -> dict[str, Any]:
    """Dotted field → value: the config's columns in a table. The student's arguments are one column, as JSON."""
    columns = flat(config.model_dump(mode="json", exclude={"student": {"arguments"}}))
    return columns | {"student.arguments": json.dumps(config.student.arguments, sort_keys=True)}


def stable_hash(data: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of plain data: the same in every process and on every machine."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hashed(config: TrialConfig) -> dict[str, Any]:
    """The fields that a trial's id depends on, as plain data.

    Left out are the names of the teacher and of the student's file, the device, `quantisation`, `attention_weight`,
    `num_passes` and `reselect` where they do not act, and `latency`, `mixed_with` and `enough_kl` at their defaults:
    trials from before they came keep their ids.
    """
    left_out: dict[str, Any] = {"teacher": True, "device": True, "student": {"weights"}}
    left_out |= {"quantisation": True} if not config.quantisation.int8 else {}
    unused = {name for name in ("attention_weight", "num_passes") if not getattr(config.distillation, name)}
    left_out |= {"distillation": unused} if unused else {}
    left_out |= {"reconstruction": {"reselect"}} if not config.reselects else {}
    left_out |= {"reference": {"mixed_with"}} if config.reference.mixed_with == "images" else {}
    left_out |= {"enough_kl": True} if not config.enough_kl else {}
    left_out |= {"latency": True} if config.latency == LatencyConfig() else {}
    return config.model_dump(mode="json", exclude=left_out)


def config_hash(config: BaseModel) -> str:
    """Hash of every field of a config: equal configs, equal hashes."""
    return stable_hash(config.model_dump(mode="json"))


def follows(field: str) -> bool:
    """Whether a (dotted) field is derived from others and not worth showing: the hash of a record or of weights."""
    return field.rpartition(".")[2] in ("record_sha256", "weights_sha256")


def versions() -> dict[str, int]:
    """The versions of the algorithms, as the columns of a row."""
    return {"trial_version": TRIAL_VERSION, "synthesis_version": SYNTHESIS_VERSION}


def round_key(
    teacher_hash: str, config: BaseModel, domain: str, state_hash: str | None, student: BaseModel | None
) -> str:
    """The key of one round: the synthesis key if the round has no state, else a hash of it and the state's hash.

    `student`: the config of the student that the round's images depend on; None if they depend on none.
    """
    key = synthesis_key(teacher_hash, config, domain)
    if state_hash is None:
        return key
    architecture = None if student is None else student.model_dump(mode="json")
    return stable_hash({"of": key, "state": state_hash, "student": architecture})


def seeds_key(teacher_hash: str, config: BaseModel, domain: str = "train", round_number: int = 0) -> str:
    """Hash of the teacher and of every config field that changes pixels; batch seeds are derived from it.

    `domain` separates the seeds of the held-out reference set from those of training images. The algorithm's version is
    not included: raising it alone changes no image. The student is not included either, so that another student is
    compared on the same noise.
    """
    of = {"teacher": teacher_hash, "config": config.model_dump(mode="json"), "domain": domain}
    return stable_hash(of | ({"round": round_number} if round_number else {}))


def synthesis_key(teacher_hash: str, config: BaseModel, domain: str = "train") -> str:
    """Hash of everything that determines pixels, `SYNTHESIS_VERSION` included: one key, one sequence of batches."""
    return stable_hash({"of": seeds_key(teacher_hash, config, domain), "version": SYNTHESIS_VERSION})
