"""The batch cache: synthetic batches by synthesis key, on disk or any pyarrow file system, shared by all processes.

One file (a shard) holds one batch, so damage or a killed process costs one batch at most. Each shard contains its own
checksum; a damaged shard is made again. There is no shared list of checksums, because writing it would need a lock,
which object stores do not have. A key's manifest only describes the key, so all writers write the same content. Each
numerics class (device, instruction set, torch version) has its own folder, so a cached batch has exactly the bytes that
this machine would make. On a local disk, processes that need the same key divide its batches with locks. On other file
systems two processes may make the same batch; they write the same bytes.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import dfkd_ray
from dfkd_ray import storage, targets
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.config import stable_hash
from dfkd_ray.storage import Folder, Where

POLL_S = 0.05

SCHEMA = "dfkd_ray.cache/1"
CONTRIBUTION = "contribution."  # name prefix of a batch's contributions to the next round
NOTHING: Mapping[str, np.ndarray] = {}
MANIFEST = "manifest.json"
NAMED = "the cache "  # prefix of the errors of the cache's disk or store
TEXTS = ("key", "numerics", "teacher_hash", "teacher", "domain", "package_version")

FOLDER_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}")
SHARD_NAME = re.compile(r"batch-(\d{6,})\.safetensors")
LOCK_NAME = re.compile(r"\.\d{6,}\.lock")
DTYPES = {
    name: np.dtype(code)
    for name, code in {
        **{"BOOL": "?", "U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4", "F64": "<f8"},
        **{"U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"},
    }.items()
}


def default_folder() -> Path:
    """`DFKD_RAY_CACHE`, or `dfkd_ray` in the user's cache folder."""
    given = os.environ.get("DFKD_RAY_CACHE")
    if given and "://" in given:
        shown = storage.without_secrets(given)
        raise ValueError(f"DFKD_RAY_CACHE={shown}: expected a local folder; a URI is given as `cache`")
    return Path(given) if given else own_folder()


def own_folder() -> Path:
    """`dfkd_ray` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfkd_ray"


def check_target(root: Where) -> Folder:
    """The folder, if it may be used as a cache. `ValueError` if it holds other files and no key of ours."""

    def holds_keys(folder: Folder) -> bool:
        is_default = folder == storage.folder(own_folder())
        return is_default or any(FOLDER_NAME.fullmatch(inner.name) for inner in folder.folders())

    return targets.check(root, targets.Product("a batch cache", {}, holds_keys))


def is_own_file(name: str) -> bool:
    """Whether a file name in a key's folder is one of this module's."""
    return name == MANIFEST or any(form.fullmatch(name) for form in (SHARD_NAME, LOCK_NAME))


def folder_name(key: str, numerics: str) -> str:
    """The name of the folder of a key's batches."""
    return f"{key[:32]}-{stable_hash(numerics)[:8]}"


def folder_of(root: Where, key: str, numerics: str) -> Folder:
    """The folder of a key's batches; `numerics` is the result of `devices.numerics_class`.

    `ValueError` for a symbolic link: files of ours would be written elsewhere.
    """
    folder = storage.folder(root) / folder_name(key, numerics)
    if folder.is_local and folder.path.is_symlink():
        raise ValueError(f"the cache {folder}: a symbolic link where a folder was expected; remove it")
    return folder


def name_of(index: int) -> str:
    """The file name of batch `index`."""
    return f"batch-{index:06d}.safetensors"


def indices(folder: Where) -> set[int]:
    """The indices of the batches in a folder, from one listing; the files are not checked."""
    matches = (SHARD_NAME.fullmatch(name) for name in storage.folder(folder).names())
    return {int(match[1]) for match in matches if match}


def digest(
    index: int,
    images: np.ndarray,
    labels: np.ndarray,
    terms: str = "",
    contribution: Mapping[str, np.ndarray] = NOTHING,
) -> str:
    """SHA-256 over a batch's index, types, shapes and bytes of its arrays, and its terms as JSON text.

    The index is included so that a shard under another shard's name counts as damaged.
    """
    sha = hashlib.sha256(f"{index} {images.dtype}{images.shape}{labels.dtype}{labels.shape}{terms}".encode())
    for array in (images, labels):
        # A view of the bytes: a copy would double the memory of a batch.
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    for name, array in sorted(contribution.items()):
        sha.update(f"{name} {array.dtype}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def write(folder: Where, batch: Batch) -> None:
    """Write one batch atomically."""
    terms = json.dumps(batch.terms)
    sha256 = digest(batch.index, batch.images, batch.labels, terms, batch.contribution)
    meta = {"key": batch.key, "terms": terms, "sha256": sha256}
    arrays = {"labels": batch.labels, "images": batch.images}
    arrays |= {CONTRIBUTION + name: array for name, array in sorted(batch.contribution.items())}
    with explained(folder):
        storage.folder(folder).write(name_of(batch.index), *pack(meta, arrays))


@contextlib.contextmanager
def explained(folder: Where) -> Iterator[None]:
    """Name the cache and the folder in an `OSError` of the body, to tell it from errors of the results place."""
    try:
        yield
    except Timeout:  # another process holds a lock
        raise
    except OSError as error:
        message = f"{NAMED}{storage.folder(folder)}: {storage.in_one_line(error)}"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error


def pack(meta: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """A shard as byte parts to be written in sequence, without copies: the inverse of `parse`."""
    header: dict[str, Any] = {"__metadata__": meta}
    parts: list[bytes | memoryview] = []
    offset = 0
    for name, given in arrays.items():
        array = np.ascontiguousarray(given).reshape(np.shape(given))
        dtype = next(word for word, kind in DTYPES.items() if kind == array.dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
        parts.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays are aligned in the file
    return [len(text).to_bytes(8, "little") + text, *parts]


def read(folder: Where, index: int, key: str) -> Batch | None:
    """Read batch `index`; None if it is missing, damaged or of another key."""
    with explained(folder):
        data = storage.folder(folder).read(name_of(index))
    batch = None if data is None else unpack(data, index)
    return batch if batch is not None and batch.key == key else None


def unpack(data: bytes, index: int) -> Batch | None:
    """Batch `index`, with arrays that are views of `data`; None if `data` is not its intact shard."""
    try:
        meta, arrays = parse(data)
        images, labels = arrays.pop("images"), arrays.pop("labels")
        contribution = {name.removeprefix(CONTRIBUTION): array for name, array in arrays.items()}
        key, terms = meta["key"], meta["terms"]
        if meta["sha256"] != digest(index, images, labels, terms, contribution):
            return None
        values = json.loads(terms)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # a wrong byte can cause each of these
        return None
    return Batch(index, images, labels, key, values, contribution) if isinstance(values, dict) else None


def parse(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a shard without a copy.

    The format: 8 bytes of header size (little-endian), a JSON header, the arrays one after the other. Source:
    safetensors, "Format" in its README. The library's own reader copies every array.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    if len(data) < max(begin, 8):
        raise ValueError("shorter than its header")
    header = json.loads(data[8:begin])
    arrays, spans = {}, []
    for name in header:
        if name == "__metadata__":
            continue
        dtype, shape = DTYPES[header[name]["dtype"]], header[name]["shape"]
        start, stop = header[name]["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name}: invalid sizes")
        if math.prod(shape) * dtype.itemsize != stop - start or begin + stop > len(data):
            raise ValueError(f"{name}: sizes that do not fit")
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), begin + start).reshape(shape)
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("bytes that belong to no array, or to two")
        end = stop
    if end != len(data) - begin:
        raise ValueError("bytes that belong to no array")
    metadata = header["__metadata__"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is no map of texts")
    return metadata, arrays


def fetched(indices: Iterable[int], key: str, make: BatchSource, folder: Where | None) -> Iterator[tuple[Batch, bool]]:
    """Yields (batch, cached) for each index once, in any order: read from `folder`, or made and written there.

    Locks are the operating system's and end with their process, so a killed process cannot block others.
    """
    left = list(dict.fromkeys(indices))
    while left:
        before = len(left)
        for index in list(left):
            batch, cached = obtain(index, key, make, folder)
            if batch is not None:
                left.remove(index)
                yield batch, cached
        if len(left) == before:
            time.sleep(POLL_S)


def fetch(indices: Iterable[int], key: str, make: BatchSource, folder: Where | None) -> list[Batch]:
    """The batches of `fetched`, in the order of `indices`."""
    wanted = list(indices)
    found = {batch.index: batch for batch, _ in fetched(wanted, key, make, folder)}
    return [found[index] for index in wanted]


def obtain(index: int, key: str, make: BatchSource, folder: Where | None) -> tuple[Batch | None, bool]:
    """(batch, cached); (None, False) while another process is making the batch."""
    if folder is None:
        return make(index), False
    folder = storage.folder(folder)
    batch = read(folder, index, key)
    if batch is not None:
        return batch, True
    try:
        with contextlib.ExitStack() as held:
            with explained(folder):
                held.enter_context(lock(folder, index))
            # The previous holder of the lock may have written it.
            batch = read(folder, index, key) if folder.is_local else None
            if batch is not None:
                return batch, True
            batch = make(index)
            write(folder, batch)
            return batch, False
    except Timeout:
        return None, False


def lock(folder: Folder, index: int) -> contextlib.AbstractContextManager[Any]:
    """The lock on making batch `index`; no lock where the folder is not local."""
    if not folder.is_local:
        return contextlib.nullcontext()
    folder.path.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.path / f".{index:06d}.lock", timeout=0)


def write_manifest(
    folder: Where,
    *,
    key: str,
    numerics: str,
    teacher_hash: str,
    teacher: str,
    domain: str,
    config: Mapping[str, Any],
) -> None:
    """Write a folder's manifest unless it exists. On a local disk also set its time, which records the last use."""
    folder = storage.folder(folder)
    with explained(folder):
        found = read_manifest(folder)
    if found is not None:
        folder.touch(MANIFEST)
        return
    texts = {"key": key, "numerics": numerics, "teacher_hash": teacher_hash, "teacher": teacher, "domain": domain}
    data = {"schema": SCHEMA, **texts, "config": dict(config), "package_version": dfkd_ray.__version__}
    with explained(folder):
        folder.write(MANIFEST, json.dumps(data, indent=1, allow_nan=False).encode())


def read_manifest(folder: Where) -> dict[str, Any] | None:
    """A folder's manifest; None if it is missing or damaged."""
    data = storage.folder(folder).read(MANIFEST)
    try:
        manifest = None if data is None else json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        return None
    texts = all(isinstance(manifest.get(name), str) for name in TEXTS)
    return manifest if texts and isinstance(manifest.get("config"), dict) else None
