"""Bundles as folders: their files read, checked and written; their activation records.

Nothing here builds a network (`teacher` does). Files are read only when needed, and their sizes are checked before.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dfkd_ray import models, storage, targets, untrusted
from dfkd_ray.bundles import packing, pretrained
from dfkd_ray.bundles.weights import PACKED, from_stored, read_safetensors
from dfkd_ray.config import stable_hash
from dfkd_ray.description import SCHEMA, WITH_EDITS, BundleInfo
from dfkd_ray.records import format
from dfkd_ray.records.format import Record
from dfkd_ray.storage import Folder, Where
from dfkd_ray.text import one_line

BUNDLED = Path(__file__).parents[1] / "bundled"
DESCRIPTION, WEIGHTS, RECORDS = "teacher.json", "weights.safetensors", "records"
ENDING = ".safetensors"
KEPT = re.compile(r'(\n +"kept": \[)\s+([\d,\s]+?)\s+\]')  # no text of a description has a line break in it
MAX_GROWTH = 16  # largest ratio of a weights file's bytes to the bytes of its architecture's tensors


def teacher_hash(info: BundleInfo) -> str:
    """Hash of everything that determines the network's output; names, notes and accuracies are left out."""
    fields = ("architecture", "arguments", "num_classes", "mean", "std", "pixel_range", "weights_sha256")
    # The shape's name is that of the first version, so that hashes stay.
    of = {**info.model_dump(mode="json", include=set(fields)), "image_shape": list(info.input_shape)}
    return stable_hash(of | ({} if info.head == "softmax" else {"head": info.head}))


@contextmanager
def explained(where: Where) -> Iterator[None]:
    """Add the bundle's name and advice to an `OSError` of a remote store; a local disk's error names its file."""
    try:
        yield
    except OSError as error:
        if "://" not in str(where):
            raise
        raise OSError(
            f"teacher {storage.without_secrets(str(where))} cannot be read or written: {storage.in_one_line(error)}; "
            "check the address, and that this machine may use it"
        ) from error


def content(folder: Folder, name: str, most: int) -> bytes | None:
    """The content of a file; None if it does not exist. `ValueError` if it exceeds `most` bytes or is not plain."""
    if folder.is_local:
        untrusted.plain_file(folder.path / name)
    found = folder.size(name)
    if found is None:
        return None
    untrusted.check_size(found, most, str(folder / name))
    data = folder.read(name)
    if data is not None:  # not every store reports sizes
        untrusted.check_size(len(data), most, str(folder / name))
    return data


def is_bundle(folder: Folder) -> bool:
    """Whether the folder is a bundle. `OSError` (one line) if it cannot be reached or access is denied."""
    with explained(folder):
        if folder.is_local:
            return untrusted.plain_file(folder.path / DESCRIPTION) is not None
        return folder.size(DESCRIPTION) is not None


def locate(name: Where) -> Folder:
    """The folder of a bundle, given as path, URI or name of a bundled teacher.

    `ValueError` if there is no bundle; `OSError` if a URI cannot be read.
    """
    shown = one_line(storage.without_secrets(str(name)), 120)
    if pretrained.is_named(name):
        raise ValueError(
            f"teacher {shown!r} is a library's network, which has no folder; make a bundle of it first: "
            "`dfkd-ray teacher import` takes this name in the place of a file"
        )
    if isinstance(name, Folder) or "://" in str(name):
        with explained(name):
            folder = storage.folder(name)
        if is_bundle(folder):
            return folder
        raise ValueError(
            f"teacher {shown!r}: no bundle there; expected {DESCRIPTION} and {WEIGHTS} in it, and for activation "
            f"records {RECORDS}/<kind>{ENDING} (make a bundle with `dfkd-ray teacher import`, and copy its files)"
        )
    for path in (Path(name), BUNDLED / name):
        if untrusted.plain_file(path / DESCRIPTION, f"teacher {shown!r}: {DESCRIPTION}") is not None:
            return storage.folder(path)
    shipped = sorted(path.parent.name for path in BUNDLED.glob("*/teacher.json"))
    raise ValueError(
        f"teacher {shown!r}: no folder with a teacher.json there; expected a bundle folder or its URI (make one with "
        f"`dfkd-ray teacher import`) or a bundled teacher ({', '.join(shipped) or 'none'})"
    )


def read_info(where: Where) -> BundleInfo:
    """Read and check `teacher.json`."""
    folder = storage.folder(where)
    path = folder / DESCRIPTION
    with explained(folder):
        text = content(folder, DESCRIPTION, untrusted.MAX_JSON_BYTES)
    if text is None:
        raise ValueError(f"{path}: no such file")
    data = untrusted.parse_json(text, str(path))
    if not isinstance(data, dict) or data.get("schema_version") not in (SCHEMA, WITH_EDITS):
        found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
        known = f"{SCHEMA!r} and {WITH_EDITS!r}"
        raise ValueError(f"{path}: schema_version is {one_line(repr(found), 60)}, this version reads {known}")
    return untrusted.validated(BundleInfo, data, str(path))


def read_weights(folder: Folder, info: BundleInfo) -> dict[str, Tensor]:
    """The state dict of a bundle. The file's SHA-256 is checked before it is parsed."""
    where = str(folder / WEIGHTS)
    largest = untrusted.free_bytes() // 2
    if ":" not in info.architecture:
        own = models.state_bytes(info.architecture, info.arguments, info.num_classes, info.image_shape)
        largest = min(largest, MAX_GROWTH * own + untrusted.SPARE_BYTES)
    file: Path | bytes | None
    if folder.is_local:  # mapped into memory, not copied
        file = folder.path / WEIGHTS
        found = untrusted.plain_file(file, where)
        if found is None:
            file = None
        else:
            untrusted.check_size(found.st_size, largest, where)
    else:
        with explained(folder):
            file = content(folder, WEIGHTS, largest)
    if file is None:
        raise ValueError(f"{folder}: {WEIGHTS} is missing")
    digest = sha256(file)
    if digest != info.weights_sha256:
        raise ValueError(
            f"{where}: SHA-256 is {digest[:12]}…, teacher.json says {info.weights_sha256[:12]}…; "
            "the file is truncated or not the one of this bundle"
        )
    return from_stored(read_safetensors(file, where), where, largest)


def sha256(file: Path | bytes) -> str:
    """SHA-256 of a file or of its content, hex."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file. The library's own writer does not report a full disk as `OSError`."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage_at = tensor.untyped_storage().data_ptr()
        # A module under two names has each tensor twice; the library refuses tensors that share memory.
        plain[name] = tensor.clone() if storage_at in seen else tensor
        seen.add(storage_at)
    return safetensors.torch.save(plain, metadata)


def to_stored(state: Mapping[str, Tensor], pruned: Sequence[str]) -> dict[str, Tensor]:
    """A state dict as stored: as it is or, if tensors are named in `pruned`, as one tensor in the form of `packing`."""
    if pruned:
        return {PACKED: torch.from_numpy(np.frombuffer(packing.pack(state, pruned), np.uint8).copy())}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def stored_bytes(state: Mapping[str, Tensor], pruned: Sequence[str]) -> int:
    """Size in bytes of the weights file that `save` would write."""
    return len(safetensors_bytes(to_stored(state, pruned)))


def stored_sha256(state: Mapping[str, Tensor], pruned: Sequence[str]) -> str:
    """SHA-256 of the weights file that `save` would write."""
    return sha256(safetensors_bytes(to_stored(state, pruned)))


def is_description(data: bytes) -> bool:
    """Whether these bytes are a bundle's `teacher.json`, of this version of the schema or another."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("schema_version")).startswith(SCHEMA.rpartition("/")[0] + "/")


BUNDLE = targets.Product("a bundle", {DESCRIPTION: is_description})


def save(where: Where, info: BundleInfo, state: Mapping[str, Tensor], pruned: Sequence[str] = ()) -> BundleInfo:
    """Write a bundle atomically. Returns `info` with the weights' hash.

    A new folder is written under a hidden name beside its place, then renamed. In an existing bundle the two files are
    replaced, weights first, and records of another teacher are removed. The hash in `teacher.json` tells whether the
    weights belong to it. `ValueError` if the folder holds something else, or if no bundle can have so long a
    description. After an `OSError` (for example, a full disk)
    a local bundle is unchanged.
    """
    folder = targets.check(where, BUNDLE)
    weights = safetensors_bytes(to_stored(state, pruned))
    info = info.model_copy(update={"weights_sha256": sha256(weights)})
    description = described(info)
    untrusted.check_size(len(description), untrusted.MAX_JSON_BYTES, str(folder / DESCRIPTION))
    if not folder.is_local:
        for name, data in ((WEIGHTS, weights), (DESCRIPTION, description)):
            folder.write(name, data)
    elif targets.contents(folder):
        storage.write_files(folder.path, {WEIGHTS: [weights], DESCRIPTION: [description]})
    else:
        write_folder(folder.path, {WEIGHTS: [weights], DESCRIPTION: [description]})
    remove_records(folder, of_others_than=teacher_hash(info))
    return info


def described(info: BundleInfo) -> bytes:
    """The content of `teacher.json`: a line for each value, but one for all channels of an edit.

    A line for each channel would make the file of a large network larger than `read_info` takes.
    """
    text = info.model_dump_json(indent=2)
    text = KEPT.sub(lambda found: found[1] + " ".join(found[2].split()) + "]", text)
    return (text + "\n").encode()


def write_folder(folder: Path, files: Mapping[str, Sequence[bytes]]) -> None:
    """Create a folder with these files atomically: written under a hidden name beside its place, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        storage.write_files(partial, files)
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        for name in files:
            (partial / name).unlink(missing_ok=True)
        if partial.is_dir():
            partial.rmdir()


def remove_records(folder: Folder, of_others_than: str) -> None:
    """Remove a bundle's activation records that do not belong to the teacher with this hash."""
    place = folder / RECORDS
    for kind in format.KINDS:
        name = f"{kind}{ENDING}"
        if folder.is_local and not (place.path / name).exists():
            continue
        data = place.read(name)
        if data is not None and format.teacher_hash_of(data) not in (None, of_others_than):
            place.remove(name)


def check_record_target(name: Where, kinds: Sequence[str]) -> None:
    """`ValueError` if writing records of these kinds would replace a file that is not a record."""
    folder = locate(name)
    with explained(folder):
        for kind in kinds:
            file = f"{kind}{ENDING}"
            targets.check_file(
                folder / RECORDS, file, lambda data: format.teacher_hash_of(data) is not None, "a record"
            )


def save_record(name: Where, record: Record) -> int:
    """Write a record into a bundle atomically, replacing one of the same kind; returns its size in bytes."""
    check_record_target(name, [record.info.kind])
    data, folder = format.encode(record), locate(name)
    with explained(folder):
        (folder / RECORDS).write(f"{record.info.kind}{ENDING}", data)
    return len(data)
