"""Recognises the training set of a teacher, so that the images held out of its training stay held out.

A data set known by name is recognised by its name. A folder has many paths, and it may be renamed, copied or changed:
it is recognised by the names, sizes and contents of its files, which the bundle has a note of. A folder that is not the
training set may still contain held-out images: the note has the hashes of some, which are looked for.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_ray.cli.streams import say
from dfkd_ray.plain import named
from dfkd_ray.text import one_line

if TYPE_CHECKING:
    from dfkd_ray.bundles import Teacher
    from dfkd_ray.data import LabelledImages

NOTE = "training_set"  # of the bundle
NUM_CONTENTS = 1000  # files whose content is part of a set's hash; all names and sizes are
NUM_HELD_OUT = 64  # hashes of held-out images


def note_of(data: "LabelledImages", held_out: Iterable[int]) -> dict[str, Any]:
    """The note on a training set for the bundle; empty for a set known by name, and if no image was held out."""
    rows = list(held_out)
    if not data.files or not rows:
        return {}
    assert data.folder is not None
    files = [data.folder / data.files[row] for row in spread(rows, NUM_HELD_OUT)]
    about = {"name": data.name, "num_images": len(data), "sha256": fingerprint(data)}
    return {NOTE: about | {"held_out": [image_hash(file) for file in files]}}


def spread(values: list[Any], most: int) -> list[Any]:
    """At most `most` of these values, evenly spread."""
    return values[:: -(-len(values) // most)]


def fingerprint(data: "LabelledImages") -> str:
    """SHA-256 of the names and sizes of a folder's image files, and of the contents of up to 1,000 of them."""
    assert data.folder is not None
    digest = hashlib.sha256()
    files = sorted(data.files)
    for file in files:
        digest.update(os.fsencode(f"{file}\0{size_of(data.folder / file)}\0"))
    for file in spread(files, NUM_CONTENTS):
        digest.update(bytes.fromhex(sha256(data.folder / file)))
    return digest.hexdigest()


def image_hash(path: Path) -> str:
    """An image file's size and the beginning of its SHA-256."""
    return f"{size_of(path)}-{sha256(path)[:16]}"


def size_of(path: Path) -> int:
    """The bytes of an image file. `ValueError` if it is no plain file."""
    from dfkd_ray.untrusted import plain_file

    status = plain_file(path)
    if status is None:
        raise ValueError(f"{named(path)}: no such image file")
    return status.st_size


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_training_set(teacher: "Teacher", data: "LabelledImages", name: str) -> bool:
    """Whether this is the set, opened by `name`, that the teacher was trained on.

    `ValueError` if it is not, or not as it was, and has images that were held out of the teacher's training, or may.
    """
    info = teacher.info
    num_held_out = info.notes.get("training", {}).get("num_validation", 0)
    if not data.files or not num_held_out:
        return data.name == info.dataset
    if is_named(info):
        say(
            f"note: {one_line(teacher.name, 40)} held {num_held_out:,} images of {info.dataset} out of its training; "
            f"if {named(name)} has some of them, they are used",
            error=True,
        )
        return False
    what = f"{named(name)}: {one_line(teacher.name, 40)} held {num_held_out:,} images of its training set out"
    note = info.notes.get(NOTE)
    if note is None:
        if info.dataset in (data.name, Path(name).name):  # a bundle from before there was a note
            return True
        raise ValueError(
            f"{what}, the folder {one_line(info.dataset, 40)}, and its bundle does not tell whether this is that "
            "folder; give it by that name, or train the teacher anew"
        )
    if fingerprint(data) == note["sha256"]:
        return True
    found = seen(data, set(note["held_out"]))
    if found:
        raise ValueError(
            f"{what}, and this folder has some of them ({one_line(found, 40)}), but is not the training set as it was "
            f"({note['num_images']:,} images then, {len(data):,} now), so they cannot be left out; give it as it was"
        )
    return False


def is_named(info: Any) -> bool:
    """Whether a bundle says that the network was trained on a data set known by name."""
    from dfkd_ray.data import OPENERS

    return info.dataset in OPENERS


def seen(data: "LabelledImages", hashes: set[str]) -> str | None:
    """A file of the folder with one of these hashes, or None; only files of a fitting size are read."""
    assert data.folder is not None
    sizes = {int(text.partition("-")[0]) for text in hashes}
    for file in data.files:
        if size_of(data.folder / file) in sizes and image_hash(data.folder / file) in hashes:
            return file
    return None


def own_training_set(teacher: "Teacher", root: Path) -> str:
    """Where the set is that the teacher was trained on, for `open_dataset`. `ValueError` if it is unknown or gone."""
    from dfkd_ray import data

    info = teacher.info
    if info.dataset is None:
        raise ValueError(f"{teacher.name} does not say what it was trained on")
    if is_named(info):
        return info.dataset
    typed = info.notes.get("training", {}).get("dataset", info.dataset)
    places = list(dict.fromkeys((str(typed), info.dataset, str(root / info.dataset))))
    for place in places:
        if data.is_folder(Path(os.path.expanduser(place))):
            return place
    raise ValueError(
        f"the folder that {teacher.name} was trained on is not here; looked for {', '.join(map(named, places))}"
    )
