"""Decides whether a command may write to a folder, so that no file of the user is lost.

No command removes or replaces a file that it did not write. An output folder must be new, empty, or made by the same
command before; a marker file in it shows that. The working folder, home, root, their parents and mount points are
always refused.
"""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dfkd_ray import storage
from dfkd_ray.plain import named
from dfkd_ray.storage import Folder, Where

HEAD_BYTES = 32 << 20  # read to recognise a file: our markers are smaller, our large files have headers
NUM_NAMED = 3  # files named in a refusal


@dataclass(frozen=True)
class Product:
    """The output of a command, and how to recognise earlier output of it in a folder.

    `markers`: file name → predicate on the file's content that tells whether the command wrote it. One matching marker
    is enough, or `holds` returning true for the folder.
    """

    what: str
    markers: Mapping[str, Callable[[bytes], bool]]
    holds: Callable[[Folder], bool] = lambda _folder: False


def check(where: Where, product: Product) -> Folder:
    """The folder, if `product` may be written there; else `ValueError` (one line)."""
    folder = storage.folder(where)
    if folder.is_local:
        refuse_shared(folder.path)
        refuse_no_folder(folder.path)
    found = contents(folder)
    if found and not is_ours(folder, product):
        names = ", ".join(named(name) for name in found[:NUM_NAMED])
        more = f" and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
        raise ValueError(
            f"{named(folder)}: it holds what is not {product.what} of dfkd_ray ({names}{more}), and "
            "nothing there is touched; choose a new or an empty folder"
        )
    return folder


def check_file(folder: Folder, name: str, is_own: Callable[[bytes], bool], what: str) -> None:
    """`ValueError` if the file exists and `is_own` does not recognise its content."""
    path = folder / name
    if folder.is_local:
        status = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.lstat(path.path)
        if status is None:
            return
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{named(path)}: it is there and no plain file; choose another name")
    data = head(folder, name)
    if data is not None and not is_own(data):
        raise ValueError(
            f"{named(path)}: it is there already and not {what} of dfkd_ray; choose another name, or move it away"
        )


def is_ours(folder: Folder, product: Product) -> bool:
    """Whether a marker shows that the command has written this folder."""
    for name, is_own in product.markers.items():
        data = head(folder, name)
        if data is not None and is_own(data):
            return True
    return product.holds(folder)


def head(folder: Folder, name: str) -> bytes | None:
    """The beginning of a file; None if it does not exist or is not a plain file."""
    if not folder.is_local:
        return folder.read(name)
    try:
        if not stat.S_ISREG(os.lstat(folder.path / name).st_mode):
            return None
        with (folder.path / name).open("rb") as file:
            return file.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None


def claims(schema: str) -> Callable[[bytes], bool]:
    """A predicate: whether bytes are a claim of this schema (see `claim`), of any version."""

    def is_own(data: bytes) -> bool:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and str(found.get("schema")).rpartition("/")[0] == schema.rpartition("/")[0]

    return is_own


def claim(folder: Folder, name: str, schema: str, **notes: str) -> None:
    """Write the marker `name` that claims a folder, before anything else is written there."""
    folder.write(name, (json.dumps({"schema": schema, **notes}) + "\n").encode())


@contextlib.contextmanager
def retracting(folder: Folder, name: str) -> Iterator[None]:
    """If the block raises before it has written anything but the claim `name`, remove the claim, and a new folder."""
    was_there = not folder.is_local or os.path.lexists(folder.path)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the block's own error is the one to report
            if contents(folder) == [name]:
                folder.remove(name)
            if not was_there:
                os.rmdir(folder.path)
        raise


def contents(folder: Folder) -> list[str]:
    """All names in a folder, sorted, without leftovers of our killed writes; empty if it does not exist."""
    if folder.is_local:
        try:
            names = os.listdir(folder.path)
        except FileNotFoundError:
            names = []
    else:
        names = [*folder.sizes(), *(inner.name for inner in folder.folders())]
    return sorted(name for name in names if not storage.is_leftover(name))


def refuse_shared(path: Path) -> None:
    """`ValueError` for the working folder, home, root, their parents and mount points."""
    real = os.path.realpath(path)
    special = {"your home folder": os.path.expanduser("~")}
    with contextlib.suppress(OSError):  # the working folder may have been removed
        special["the working folder"] = os.getcwd()
    advice = "choose a folder of its own below it"
    if real == os.path.sep:
        raise ValueError(f"{path}: it is the root of the file system; {advice}")
    for what, folder in special.items():
        inner = os.path.realpath(folder)
        if inner == real:
            raise ValueError(f"{named(path)}: it is {what}; {advice}")
        if inner.startswith(real + os.path.sep):
            raise ValueError(f"{named(path)}: {what} lies in it; {advice}")
    if os.path.ismount(real):
        raise ValueError(f"{named(path)}: it is a mount point; {advice}")


def refuse_no_folder(path: Path) -> None:
    """`ValueError` if the path or one of its parents exists and is not a folder."""
    for part in (path, *path.parents):
        try:
            mode = os.stat(part).st_mode
        except FileNotFoundError:
            if os.path.islink(part):
                raise ValueError(f"{named(part)}: a link to nothing; choose another folder") from None
            continue
        except NotADirectoryError:
            continue
        except OSError as error:
            raise ValueError(f"{named(part)}: {error.strerror}; choose another folder") from None
        if not stat.S_ISDIR(mode):
            raise ValueError(f"{named(part)}: expected a folder, and it is none")
        return
