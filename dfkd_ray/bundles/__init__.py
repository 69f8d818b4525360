"""Bundles: a trained network stored as a folder. Loading one never runs code from it.

A bundle has `teacher.json` (schema version, architecture and arguments, class count, image shape, mean / std / pixel
range, test accuracy if known, SHA-256 of the weights) and `weights.safetensors`. A pruned student is a bundle too: its
weights are stored compressed (`packing`) and come back bit for bit. One pruned by channels has schema 2 with
`shape_edits`: the architecture is built dense, and keeps the channels that they name. The folder is on a disk or at any
URI that `storage` opens. Files are read only when needed. An architecture given by import path is imported only if the
user has named that module.
"""

from dfkd_ray.bundles.folders import (
    BUNDLE,
    BUNDLED,
    DESCRIPTION,
    WEIGHTS,
    check_record_target,
    content,
    described,
    explained,
    is_bundle,
    locate,
    read_info,
    read_weights,
    safetensors_bytes,
    save,
    save_record,
    sha256,
    stored_bytes,
    stored_sha256,
    teacher_hash,
    to_stored,
    write_folder,
)
from dfkd_ray.bundles.in_memory import Description
from dfkd_ray.bundles.matching import from_file, match
from dfkd_ray.bundles.teacher import (
    IN_MEMORY,
    Teacher,
    freeze,
    from_arrays,
    load,
    to_arrays,
)
from dfkd_ray.bundles.weights import filled, from_stored, load_state, read_state_dicts
from dfkd_ray.description import BundleInfo

__all__ = [
    "BUNDLE",
    "BUNDLED",
    "DESCRIPTION",
    "IN_MEMORY",
    "WEIGHTS",
    "BundleInfo",
    "Description",
    "Teacher",
    "check_record_target",
    "content",
    "described",
    "explained",
    "filled",
    "freeze",
    "from_arrays",
    "from_file",
    "from_stored",
    "is_bundle",
    "load",
    "load_state",
    "locate",
    "match",
    "read_info",
    "read_state_dicts",
    "read_weights",
    "safetensors_bytes",
    "save",
    "save_record",
    "sha256",
    "stored_bytes",
    "stored_sha256",
    "teacher_hash",
    "to_arrays",
    "to_stored",
    "write_folder",
]
