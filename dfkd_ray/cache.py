"""Batches on disk by synthesis key, shared by trials, processes and runs.

One file per batch, written whole, with a checksum; a damaged one is made again. Another numerics class (device,
instruction set, torch version) is another folder, so a hit always has the bytes that making it here would give.
Processes that want the same key share the work: each makes a batch that nobody else is making.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from filelock import FileLock, Timeout

from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.config import stable_hash

POLL_S = 0.05


def default_folder() -> Path:
    """`DFKD_RAY_CACHE`, or `dfkd_ray` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DFKD_RAY_CACHE") or Path(base) / "dfkd_ray")


def folder_of(root: Path, key: str, numerics: str) -> Path:
    """Where the batches of a key lie; `numerics` is `devices.numerics_class`."""
    return root / f"{key[:32]}-{stable_hash(numerics)[:8]}"


def digest(images: np.ndarray, labels: np.ndarray, terms: str = "") -> str:
    """SHA-256 over types, shapes and bytes of a batch's arrays, and over its terms as JSON text."""
    sha = hashlib.sha256(f"{images.dtype}{images.shape}{labels.dtype}{labels.shape}{terms}".encode())
    sha.update(images.tobytes())
    sha.update(labels.tobytes())
    return sha.hexdigest()


def write(folder: Path, batch: Batch) -> None:
    """Write one batch whole: hidden temporary name, fsync, rename."""
    folder.mkdir(parents=True, exist_ok=True)
    terms = json.dumps(batch.terms)
    meta = {"key": batch.key, "terms": terms, "sha256": digest(batch.images, batch.labels, terms)}
    # The library writes the memory of a strided array as it lies.
    arrays = {"images": np.ascontiguousarray(batch.images), "labels": np.ascontiguousarray(batch.labels)}
    data = safetensors.numpy.save(arrays, metadata=meta)
    partial = folder / f".{batch.index:06d}.{os.getpid()}.part"
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path_of(folder, batch.index))
    finally:
        partial.unlink(missing_ok=True)


def path_of(folder: Path, index: int) -> Path:
    """The file of batch `index`."""
    return folder / f"batch-{index:06d}.safetensors"


def read(folder: Path, index: int, key: str) -> Batch | None:
    """Batch `index`, or None where it is not there, damaged, or of another key."""
    path = path_of(folder, index)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, ValueError, TypeError, safetensors.SafetensorError):
        return None
    terms = meta.get("terms", "")
    if meta.get("key") != key or meta.get("sha256") != digest(images, labels, terms):
        return None
    return Batch(index, images, labels, key, json.loads(terms))


def fetch(
    indices: Iterable[int],
    key: str,
    make: BatchSource,
    folder: Path | None,
    on_batch: Callable[[Batch, bool], None] | None = None,
) -> list[Batch]:
    """Batches by index, from `folder` or made; without a folder, just made.

    `on_batch(batch, was_cached)` is told of each. A lock is the operating system's: it goes with its process, so a
    killed maker cannot block the others.
    """
    wanted = list(indices)
    found: dict[int, Batch] = {}
    while len(found) < len(set(wanted)):
        progress = False
        for index in wanted:
            if index in found:
                continue
            batch, cached = obtain(index, key, make, folder)
            if batch is None:
                continue
            found[index], progress = batch, True
            if on_batch:
                on_batch(batch, cached)
        if not progress:
            time.sleep(POLL_S)
    return [found[index] for index in wanted]


def obtain(index: int, key: str, make: BatchSource, folder: Path | None) -> tuple[Batch | None, bool]:
    """One batch and whether it was cached; (None, False) while another process is making it."""
    if folder is None:
        return make(index), False
    batch = read(folder, index, key)
    if batch is not None:
        return batch, True
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{index:06d}.lock", timeout=0):
            batch = read(folder, index, key)  # the one who held the lock may just have written it
            if batch is not None:
                return batch, True
            batch = make(index)
            write(folder, batch)
            return batch, False
    except Timeout:
        return None, False
