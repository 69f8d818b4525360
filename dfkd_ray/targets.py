"""Where a command may write: the one place that decides whether something of the user's would be lost.

No command removes or replaces a file that it did not write. A folder to be written is new, or empty, or holds what the
same command made there before, which one of its files says (its marker). Working folder, home, root, whatever holds one
of them, and mount points are refused always: too much lies there that nobody counted.
"""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dfkd_ray import storage
from dfkd_ray.plain import named
from dfkd_ray.storage import Folder, Where

HEAD_BYTES = 32 << 20  # of a file, by which it is recognised; our markers are smaller, our large files have headers
NUM_NAMED = 3  # files named in a refusal


@dataclass(frozen=True)
class Product:
    """What a command makes in a folder, and how its own work is recognised there.

    `markers`: file name → whether a file of that name with this content was written by the command. Any one will do, or
    what `holds` finds in the folder.
    """

    what: str
    markers: Mapping[str, Callable[[bytes], bool]]
    holds: Callable[[Folder], bool] = lambda _folder: False


def check(where: Where, product: Product) -> Folder:
    """The folder, if `product` may be written there. `ValueError`, in one line, where it may not."""
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
    """`ValueError` where a file of that name is there already and `is_own` does not know its content."""
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
    """Whether a marker says that the command has written this folder."""
    for name, is_own in product.markers.items():
        data = head(folder, name)
        if data is not None and is_own(data):
            return True
    return product.holds(folder)


def head(folder: Folder, name: str) -> bytes | None:
    """The beginning of a file; None where there is none, or something else than a plain file."""
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
    """Whether bytes are a claim of this schema (see `claim`), of any version."""

    def is_own(data: bytes) -> bool:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and str(found.get("schema")).rpartition("/")[0] == schema.rpartition("/")[0]

    return is_own


def claim(folder: Folder, name: str, schema: str, **notes: str) -> None:
    """Say in the file `name` whose a folder is, before anything else is written there."""
    folder.write(name, (json.dumps({"schema": schema, **notes}) + "\n").encode())


def contents(folder: Folder) -> list[str]:
    """Names of all that lies in a folder, sorted, without what a killed write of ours left; none where it is not."""
    if folder.is_local:
        try:
            names = os.listdir(folder.path)
        except FileNotFoundError:
            names = []
    else:
        names = [*folder.sizes(), *(inner.name for inner in folder.folders())]
    return sorted(name for name in names if not storage.is_leftover(name))


def refuse_shared(path: Path) -> None:
    """`ValueError` for a folder that holds more than one command's work by its nature."""
    real = os.path.realpath(path)
    special = {"your home folder": os.path.expanduser("~")}
    with contextlib.suppress(OSError):  # a working folder that was removed
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
    """`ValueError` where something else than a folder is in the way, here or further up."""
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
