"""A folder on the local disk or on any pyarrow file system, for files that are written whole and read whole.

The seam of what is kept between runs: few operations, each meaning the same on a disk and on an object store. There
is no append, rename or lock in it, because object stores have none. A file is whole or it is not there: on a disk by
a hidden temporary name and a rename, on an object store because an object appears when its upload is complete. A file
system between the two (`fsspec+sftp://`) may show a file while it is written: what lies there needs a checksum.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import BinaryIO, Concatenate, ParamSpec, TypeVar

from pyarrow import fs

from dfkd_ray.masking import hidden, split_query, without_secrets
from dfkd_ray.masking import public_name as public_name  # for whoever has a place: what may be shown of it
from dfkd_ray.masking import secretless as secretless
from dfkd_ray.plain import given

# What a write that was killed leaves behind on a disk ends like this.
PART = ".part"
PART_NAME = re.compile(r"\..+\.\d+-[0-9a-f]+\.part", re.DOTALL)
PROBE = ".probe-"  # begins the names of files that try whether a place can be written
PROBE_NAME = re.compile(r"\.(probe|seen)-[0-9a-f]{8}")
EXPECTED = "expected a folder, or a URI that pyarrow or fsspec can open, as in s3://bucket/folder"
P = ParamSpec("P")
R = TypeVar("R")


def refusing(method: "Callable[Concatenate[Folder, P], R]") -> "Callable[Concatenate[Folder, P], R]":
    """What client libraries below fsspec raise of kinds of their own becomes `OSError`, as with pyarrow's clients."""

    @wraps(method)
    def told(folder: "Folder", *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(folder, *args, **kwargs)
        except OSError as error:
            if folder.is_local:
                raise
            shown = [hidden(word, folder.where) if isinstance(word, str) else word for word in error.args]
            if list(error.args) == shown:
                raise
            error.args = tuple(shown)
            raise
        except Exception as error:
            if folder.is_local:
                raise
            reason = hidden(in_one_line(error), folder.where)
            raise OSError(f"{folder}: {type(error).__name__}: {reason}") from error

    return told


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder that need not exist; a write makes it. Small and picklable: connections are opened where it is used.

    `where` is an absolute path or a URI, `below` the way down from a URI (its query stays behind the whole).
    Whatever the disk or the network refuses is an `OSError`.
    """

    where: str
    below: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine's disk, where locks and renames work."""
        return "://" not in self.where

    @property
    def path(self) -> Path:
        """The path of a local folder."""
        assert self.is_local, f"{self} has no local path"
        return Path(self.where)

    @property
    def uri(self) -> str:
        """Path or URI, with whatever secret the URI holds: `folder(uri)` is this folder again."""
        head, mark, query = split_query(self.where)
        return f"{head}/{self.below}{mark}{query}" if self.below else self.where

    @property
    def name(self) -> str:
        """The last part of path or URI."""
        return split_query(self.uri)[0].rpartition("/")[2]

    def __str__(self) -> str:
        return without_secrets(self.uri)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    def __truediv__(self, name: str) -> "Folder":
        # Names come out of tables and headers too: none may lead elsewhere.
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise ValueError(f"{given(name)}: no name of a file or folder in {self}")
        if self.is_local:
            return Folder(os.path.join(self.where, name))
        return Folder(self.where, f"{self.below}/{name}" if self.below else name)

    @refusing
    def read(self, name: str) -> bytes | None:
        """The content of a file, or None when it is not there."""
        try:
            if self.is_local:
                with open_plain(self.path / name) as file:
                    return file.read()
            system, path = self._remote(name)
            with system.open_input_file(path) as file:
                return file.read()
        except FileNotFoundError:
            return None

    @refusing
    def size(self, name: str) -> int | None:
        """Bytes of a file (0 where its store does not say), or None when it is not there or no plain file."""
        if self.is_local:
            local = self.path / name
            return local.stat().st_size if local.is_file() else None
        system, path = self._remote(name)
        handler = getattr(system, "handler", None)
        if isinstance(handler, fs.FSSpecHandler):
            handler.fs.invalidate_cache(path.rpartition("/")[0])  # or what others wrote meanwhile would be missed
        info = system.get_file_info(path)
        return (info.size or 0) if info.type == fs.FileType.File else None

    @refusing
    def write(self, name: str, *data: bytes | memoryview) -> None:
        """Write a file whole, its parts one after the other, over what was there."""
        if self.is_local:
            write_local(self.path, name, data)
            return
        system, path = self._remote(name)
        try:
            put(system, path, data)
        except FileNotFoundError:  # no object store says so: this one has real folders
            system.create_dir(path.rpartition("/")[0], recursive=True)
            put(system, path, data)

    def touch(self, name: str) -> None:
        """Set a local file's time to now; elsewhere, and where that is not allowed, nothing."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.utime(self.path / name)

    def names(self) -> list[str]:
        """Names of the plain files, sorted, without hidden ones; none when the folder is not there."""
        return [name for name in self.sizes() if not name.startswith(".")]

    @refusing
    def sizes(self) -> dict[str, tuple[int, float | None]]:
        """Bytes and time of change (seconds since 1970, None where none is kept) of every plain file, sorted."""
        if not self.is_local:
            found = {
                info.base_name: (info.size or 0, None if info.mtime_ns is None else info.mtime_ns / 1e9)
                for info in self._listing()
                if info.type == fs.FileType.File
            }
            return dict(sorted(found.items()))
        found = {}
        for entry in self._local_listing():
            try:
                if entry.is_file():
                    status = entry.stat()
                    found[entry.name] = (status.st_size, status.st_mtime)
            except OSError as error:
                # A temporary file may go while it is looked at; a link that leads to itself is no file.
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
        return dict(sorted(found.items()))

    @refusing
    def folders(self) -> list["Folder"]:
        """Folders in it, sorted, without hidden ones and links; none when it is not there."""
        if self.is_local:
            names = [entry.name for entry in self._local_listing() if entry.is_dir(follow_symlinks=False)]
        else:
            names = [info.base_name for info in self._listing() if info.type == fs.FileType.Directory]
        return [self / name for name in sorted(names) if not name.startswith(".")]

    @refusing
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                (self.path / name).unlink()
            else:
                system, path = self._remote(name)
                system.delete_file(path)

    @refusing
    def clear(self, is_own: Callable[[str], bool]) -> list[str]:
        """Remove the plain files whose names are `is_own`, then the folder if it is empty; returns what stays.

        What is no plain file stays, a link too; where the folder itself is one, everything does.
        """
        if self.is_local and self.path.is_symlink():
            return sorted(os.listdir(self.path)) if self.path.is_dir() else []
        kept = []
        if self.is_local:
            for entry in self._local_listing():
                if entry.is_file(follow_symlinks=False) and (is_own(entry.name) or is_leftover(entry.name)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)
                else:
                    kept.append(entry.name)
            if not kept:
                with contextlib.suppress(FileNotFoundError):
                    self.path.rmdir()
            return sorted(kept)
        for name in self.sizes():
            if is_own(name) or is_leftover(name):
                self.remove(name)
            else:
                kept.append(name)
        kept += [inner.name for inner in self.folders()]
        if not kept:
            system, path = self._remote()
            with contextlib.suppress(FileNotFoundError):  # object stores have no empty folders
                system.delete_dir(path)
        return sorted(kept)

    def _remote(self, *names: str) -> tuple[fs.FileSystem, str]:
        system, path = opened(self.where)
        return system, "/".join(part for part in (path, self.below, *names) if part)

    def _local_listing(self) -> list[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as entries:
            return list(entries)
        return []

    def _listing(self) -> list[fs.FileInfo]:
        system, path = self._remote()
        handler = getattr(system, "handler", None)
        if isinstance(handler, fs.FSSpecHandler):
            handler.fs.invalidate_cache(path)  # or what other processes wrote meanwhile would be missed
        return system.get_file_info(fs.FileSelector(path, allow_not_found=True))


Where = str | Path | Folder


def folder(where: Where) -> Folder:
    """The folder at a path or URI. `ValueError` for a URI that nothing here can open."""
    if isinstance(where, Folder):
        return where
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        if not text:
            raise ValueError(f"an empty name for a folder: {EXPECTED}")
        return Folder(os.path.abspath(os.path.expanduser(text)))
    head, mark, query = split_query(text)
    if not head.partition("://")[2].strip("/"):
        raise ValueError(f"{without_secrets(text)}: it names no bucket or folder; {EXPECTED}")
    uri = head.rstrip("/") + mark + query
    try:
        system, path = opened(uri)
    except (ValueError, ImportError, NotImplementedError) as error:
        reason = " ".join(hidden(str(error), uri).split()).rstrip(".")
        raise ValueError(f"{without_secrets(text)}: {reason}; {EXPECTED}") from None
    if isinstance(system, fs.LocalFileSystem):
        return Folder(os.path.abspath(path))
    return Folder(uri)


@lru_cache(maxsize=64)
def opened(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path in it, once per process."""
    system, path = fs.FileSystem.from_uri(uri)
    return system, path.rstrip("/")


def in_one_line(error: BaseException) -> str:
    """What an error of the disk or the network says, without secrets."""
    strerror = getattr(error, "strerror", None)
    return without_secrets(" ".join(str(strerror or error or type(error).__name__).split()))[:300]


def open_plain(path: Path) -> BinaryIO:
    """A file to be read. `OSError` for what is none, before a pipe or a device is waited for."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "not a plain file", str(path))
    return open(number, "rb")


def write_local(parent: Path, name: str, data: Sequence[bytes | memoryview]) -> None:
    """One file of `write_files`."""
    write_files(parent, {name: data})


def write_files(parent: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    """Each under a hidden temporary name in the same folder, fsync; when all are there, renamed in their order.

    After an error there is what was there before.
    """
    parent.mkdir(parents=True, exist_ok=True)

    def hidden(name: str) -> Path:
        # The process id alone is not enough: threads share it, and hosts that share a disk may both have it.
        return parent / f".{name}.{os.getpid()}-{secrets.token_hex(4)}{PART}"

    partials, old = {name: hidden(name) for name in files}, {name: hidden(name) for name in files}
    renamed: list[str] = []
    try:
        for name, data in files.items():
            with partials[name].open("xb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
        for name, partial in partials.items():
            if len(files) > 1:
                with contextlib.suppress(OSError):  # not there yet, or a disk without hard links
                    os.link(parent / name, old[name])
            os.replace(partial, parent / name)
            renamed.append(name)
    except OSError:
        for name in renamed:
            with contextlib.suppress(FileNotFoundError):
                os.rename(old[name], parent / name)
        raise
    finally:
        for leftover in (*partials.values(), *old.values()):
            leftover.unlink(missing_ok=True)


def put(system: fs.FileSystem, path: str, data: Sequence[bytes | memoryview]) -> None:
    """Upload one object; after an error there is none."""
    stream = system.open_output_stream(path, compression=None)
    try:
        for part in data:
            stream.write(part)
        stream.close()
    except BaseException:
        # A stream cannot be given up from Python, only closed, and that may complete the upload of a part.
        with contextlib.suppress(OSError):
            stream.close()
        with contextlib.suppress(OSError):
            system.delete_file(path)
        raise


def is_part(name: str) -> bool:
    """Whether a file name is one that `write` uses on a disk until the file is whole."""
    return PART_NAME.fullmatch(name) is not None


def is_leftover(name: str) -> bool:
    """Whether a file name is one that only killed writes and trials of a place leave behind."""
    return is_part(name) or PROBE_NAME.fullmatch(name) is not None
