"""What a batch cache holds: its entries with their sizes and last use, damaged files, and the removal of entries."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfkd_ray import cache, storage
from dfkd_ray.storage import Folder, Where

LEFTOVER_S = 600.0  # a shard is written in seconds: an older temporary file belongs to no running writer
DAY_S = 86400.0


def readable_manifest(folder: Folder) -> dict[str, Any] | None:
    """Like `cache.read_manifest`, but None also after an error of disk or store."""
    try:
        return cache.read_manifest(folder)
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
    return [entry_of(folder) for folder in storage.folder(root).folders() if cache.FOLDER_NAME.fullmatch(folder.name)]


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
        manifest=readable_manifest(folder) if cache.MANIFEST in sizes else None,
        num_batches=sum(cache.SHARD_NAME.fullmatch(name) is not None for name in sizes),
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
    if cache.MANIFEST not in sizes and entry.num_batches:
        yield cache.MANIFEST, "missing: what these batches are is written when they are next used", False
    elif cache.MANIFEST in sizes and manifest is None:
        yield cache.MANIFEST, "damaged", True
    elif manifest is not None and cache.folder_name(manifest["key"], manifest["numerics"]) != entry.folder.name:
        yield cache.MANIFEST, "of another folder", True
        manifest = None
    for name, (_, changed) in sizes.items():
        if storage.is_part(name) and changed is not None and time.time() - changed > LEFTOVER_S:
            yield name, "left over by a write that was killed", False
        match = cache.SHARD_NAME.fullmatch(name)
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
    batch = cache.unpack(data, index)
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
        entry.folder.clear(cache.is_own_file)
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
