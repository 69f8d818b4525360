"""Where the files of an export come to lie: checks before any work, and placing of all files or of none.

Files are written under a hidden name beside their place, checked there, and then moved. Nothing that is there is
replaced, and after an error or an interrupt nothing is left.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dfkd_ray import storage, targets
from dfkd_ray.exporting.formats import Format
from dfkd_ray.plain import named

CARD = "README.md"  # in a folder
CARD_SUFFIX = ".md"  # of the name beside a file: student.onnx.md


def check(path: Path, row: Format) -> None:
    """`ValueError` for a place that a format cannot have, `OSError` for one that cannot be written; before any work."""
    if row.suffix and path.suffix != row.suffix:
        raise ValueError(f"{named(path)}: the format is {row.what}; expected a name that ends in {row.suffix}")
    targets.refuse_no_folder(path.parent)
    if not row.suffix:
        targets.refuse_shared(path)
    for place in places(path, row):
        if os.path.lexists(place) and not (not row.suffix and is_empty_folder(place)):
            raise ValueError(f"{named(place)}: it is there already, and is not replaced; choose another name")
    parent = next(parent for parent in path.parents if parent.exists())
    try:
        os.rmdir(hidden_folder(path, parent))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(parent)) from None


def places(path: Path, row: Format) -> list[Path]:
    """All paths that a format writes: the main file or folder last."""
    if not row.suffix:
        return [path]
    return [*([path.with_suffix(".bin")] if row.suffix == ".xml" else []), card_place(path, row), path]


def files(path: Path, row: Format, written: Mapping[str, bytes]) -> list[Path]:
    """The places of what a format has written, by name or suffix; the main file last."""
    if not row.suffix:
        return [path / name for name in written]
    return sorted((path.with_name(path.stem + suffix) for suffix in written), key=lambda place: place == path)


def card_place(path: Path, row: Format) -> Path:
    """Where the card of an exported network is: in its folder, or beside its file."""
    return path.with_name(path.name + CARD_SUFFIX) if row.suffix else path / CARD


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder with nothing in it but leftovers of our killed writes."""
    return path.is_dir() and not path.is_symlink() and not targets.contents(storage.folder(path))


def hidden_folder(path: Path, parent: Path) -> Path:
    """A new folder in `parent` for what will be at `path`."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent))


@contextlib.contextmanager
def beside(path: Path, row: Format, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write files under a hidden name beside their place; at the end of the block they are moved to it.

    If the block raises, or the disk is full, nothing is left. Yields the main file or the folder; what the block adds
    to it (`add`) is moved too.
    """
    new = [parent for parent in path.parents if not parent.exists()]
    partial, own = None, []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = hidden_folder(path, path.parent)
        contents = files if not row.suffix else {path.stem + suffix: data for suffix, data in files.items()}
        storage.write_files(partial, {name: [data] for name, data in contents.items()})
        yield partial / path.name if row.suffix else partial
        if row.suffix:
            own = [place for place in places(path, row) if (partial / place.name).exists()]
            keep(partial, places(path, row))
        else:
            partial.chmod(0o755)
            os.replace(partial, path)  # an empty folder is replaced, another one is an error
    except BaseException:
        if partial is not None:
            withdraw(partial, path, row, own)
        with contextlib.suppress(OSError):
            for parent in new:
                parent.rmdir()
        raise
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def withdraw(partial: Path, path: Path, row: Format, own: Sequence[Path]) -> None:
    """Remove a hidden folder, and what of it has been moved: an interrupt may come between a move and the next line.

    `own`: the places of the files that were in the folder before the first move.
    """
    for place in own:
        source = partial / place.name
        if os.path.lexists(place) and (not source.exists() or os.path.samefile(source, place)):
            place.unlink()
    if not row.suffix and not partial.exists():
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def add(written: Path, place: Path, data: bytes) -> None:
    """Write one more file, whose place will be `place`, beside the main file or into the folder that `beside` gave."""
    storage.write_files(written if written.is_dir() else written.parent, {place.name: [data]})


def keep(partial: Path, paths: Sequence[Path]) -> None:
    """Move files of a folder to their places. A file that is there meanwhile is not replaced."""
    for place in paths:
        source = partial / place.name
        try:
            os.link(source, place)  # unlike a rename, it fails where there is something
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(place):
                raise
            os.rename(source, place)
