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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
LEFTOVER_S = 600.0  # a shard is written in seconds: an older temporary file belongs to no running writer
DAY_S = 86400.0

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


def folder_of(root: Where, key: str, numerics: str) -> Folder:
    """The folder of a key's batches; `numerics` is the result of `devices.numerics_class`."""
    return storage.folder(root) / f"{key[:32]}-{stable_hash(numerics)[:8]}"


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
        if not isinstance(key, str) or meta["sha256"] != digest(index, images, labels, terms, contribution):
            return None
        values = json.loads(terms)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # a wrong byte can cause each of these
        return None
    return Batch(index, images, labels, key, values, contribution) if isinstance(values, dict) else None


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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
    return header["__metadata__"], arrays


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


def readable_manifest(folder: Folder) -> dict[str, Any] | None:
    """Like `read_manifest`, but None also after an error of disk or store."""
    try:
        return read_manifest(folder)
    except OSError:
        return None


@dataclass(frozen=True)
class Entry:
    """The batches of one key and numerics class; `key` is the first half of the key, as in the folder's name."""

    folder: Folder
    key: str
    manifest: dict[str, Any] | None
    num_batches: int
    size_bytes: int
    last_used: float | None
    """Latest modification time of its files, seconds since 1970; None if the file system has no times."""
    problem: str | None = None
    """Why the folder cannot be listed; the other fields are then unknown."""


@dataclass(frozen=True)
class Finding:
    """A problem of a file, found by `verify`; `damaged` is false for a harmless one."""

    entry: Entry
    name: str
    problem: str
    damaged: bool = True
    removed: bool = False


def entries(root: Where) -> list[Entry]:
    """The entries of a cache, by folder name; folders that are not ours are left out."""
    return [entry_of(folder) for folder in storage.folder(root).folders() if FOLDER_NAME.fullmatch(folder.name)]


def entry_of(folder: Folder) -> Entry:
    """One folder of a cache, from a listing and its manifest; `problem` is set if it cannot be listed."""
    try:
        sizes = folder.sizes()
    except OSError as error:
        return Entry(folder, folder.name[:32], None, 0, 0, None, storage.in_one_line(error))
    times = [changed for _, changed in sizes.values() if changed is not None]
    return Entry(
        folder=folder,
        key=folder.name[:32],
        manifest=readable_manifest(folder) if MANIFEST in sizes else None,
        num_batches=sum(SHARD_NAME.fullmatch(name) is not None for name in sizes),
        size_bytes=sum(size for size, _ in sizes.values()),
        last_used=max(times, default=None),
    )


def verify(root: Where, remove: bool = False) -> Iterator[Finding]:
    """Read every shard and compare its checksum; yields a finding for each bad file.

    With `remove`, damaged files and leftovers of killed writers are removed. Batches are made again when needed.
    """
    for entry in entries(root):
        for name, problem, damaged in problems(entry):
            removed = False
            try:
                if remove and name in entry.folder.sizes():
                    entry.folder.remove(name)
                    removed = True
            except OSError as error:
                problem += f"; not removed: {storage.in_one_line(error)}"
            yield Finding(entry, name, problem, damaged, removed)


def problems(entry: Entry) -> Iterator[tuple[str, str, bool]]:
    """Yields (file, problem, whether it is damage) for each bad file of an entry."""
    manifest = entry.manifest
    try:
        sizes = entry.folder.sizes()
    except OSError as error:
        yield "", f"cannot be looked into: {storage.in_one_line(error)}", True
        return
    if MANIFEST not in sizes and entry.num_batches:
        yield MANIFEST, "missing: what these batches are is written when they are next used", False
    elif MANIFEST in sizes and manifest is None:
        yield MANIFEST, "damaged", True
    elif manifest is not None and folder_of("/", manifest["key"], manifest["numerics"]).name != entry.folder.name:
        yield MANIFEST, "of another folder", True
        manifest = None
    for name, (_, changed) in sizes.items():
        if storage.is_part(name) and changed is not None and time.time() - changed > LEFTOVER_S:
            yield name, "left over by a write that was killed", False
        match = SHARD_NAME.fullmatch(name)
        key = manifest["key"] if manifest else None
        problem = shard_problem(entry, name, int(match[1]), key) if match else None
        if problem:
            yield name, problem, True


def shard_problem(entry: Entry, name: str, index: int, key: str | None) -> str | None:
    """What is wrong with a shard, or None."""
    try:
        data = entry.folder.read(name)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if data is None:  # removed meanwhile
        return None
    batch = unpack(data, index)
    if batch is None:
        return "damaged"
    expected = batch.key == key if key else batch.key[:32] == entry.key
    return None if expected else "of another key"


def prune(
    root: Where,
    *,
    keys: Sequence[str] = (),
    older_than_days: float | int | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> list[Entry]:
    """Remove entries and return them; with `dry_run`, only return what would be removed.

    An entry that cannot be removed is returned with its `problem`, and the others are removed. Entries that cannot be
    listed stay. `keys` (prefixes) restricts the candidates. Without further options all candidates are removed. With
    `older_than_days`, those unused for so long are removed; with `max_bytes`, then the longest unused ones until the
    rest is at most that large.
    """
    if not keys and older_than_days is None and max_bytes is None:
        raise ValueError("nothing says what to remove: give keys, an age or a size")
    found = [entry for entry in entries(root) if entry.problem is None]
    kept = [entry for entry in found if not keys or any(matches(entry, prefix) for prefix in keys)]
    for prefix in keys:
        if not any(matches(entry, prefix) for entry in found):
            raise ValueError(f"key {prefix}: {storage.folder(root)} has no key that begins so")
    kept.sort(key=lambda entry: (entry.last_used or 0.0, entry.folder.name))
    removed = kept if older_than_days is None and max_bytes is None else []
    if older_than_days is not None:
        removed = [entry for entry in kept if is_older(entry, older_than_days)]
        kept = [entry for entry in kept if entry not in removed]
    if max_bytes is not None:
        total = sum(entry.size_bytes for entry in kept)
        while total > max_bytes:
            oldest = kept.pop(0)
            removed.append(oldest)
            total -= oldest.size_bytes
    return removed if dry_run else [cleared(entry) for entry in removed]


def cleared(entry: Entry) -> Entry:
    """Remove an entry and return it; on failure it has a `problem`."""
    try:
        entry.folder.clear(is_own_file)
    except OSError as error:
        return replace(entry, problem=storage.in_one_line(error))
    return entry


def matches(entry: Entry, prefix: str) -> bool:
    """Whether an entry's key begins with a prefix. `ValueError` for an impossible prefix."""
    if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
        raise ValueError(f"key {prefix!r}: expected the first characters of a key, of 0-9 and a-f")
    return entry.key.startswith(prefix[:32])


def is_older(entry: Entry, days: float | int) -> bool:
    """Whether an entry was unused for this many days. `ValueError` if the file system has no times."""
    if entry.last_used is None and entry.num_batches:
        raise ValueError(f"{entry.folder}: this file system keeps no times, so nothing there has an age")
    return entry.last_used is not None and time.time() - entry.last_used > days * DAY_S
