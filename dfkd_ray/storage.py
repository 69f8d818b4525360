"""A folder on the local disk or on any pyarrow file system. Files are written and read as a whole.

All results, caches and bundles go through this interface. Its few operations mean the same on a disk and on an object
store. It has no append, rename or lock, because object stores have none. Writes are atomic: a disk file gets a hidden
temporary name and is renamed, and an object appears only when its upload is complete. Other file systems, such as
`fsspec+sftp://`, may show a file while it is being written: files there need a checksum.
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
from dfkd_ray.masking import public_name as public_name  # a name for display, without secrets
from dfkd_ray.masking import secretless as secretless
from dfkd_ray.plain import given

# Suffix of the temporary file that a killed write leaves on a disk.
PART = ".part"
PART_NAME = re.compile(r"\..+\.\d+-[0-9a-f]+\.part", re.DOTALL)
PROBE = ".probe-"  # prefix of test files that check whether a place is writable
PROBE_NAME = re.compile(r"\.(probe|seen)-[0-9a-f]{8}")
EXPECTED = "expected a folder, or a URI that pyarrow or fsspec can open, as in s3://bucket/folder"
P = ParamSpec("P")
R = TypeVar("R")


def refusing(method: "Callable[Concatenate[Folder, P], R]") -> "Callable[Concatenate[Folder, P], R]":
    """Decorator: on a remote folder, every exception of the client library becomes an `OSError` without secrets.

    pyarrow's own clients raise `OSError` already; libraries below fsspec have exception types of their own.
    """

    @wraps(method)
    def wrapped(folder: "Folder", *args: P.args, **kwargs: P.kwargs) -> R:
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

    return wrapped


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder, which need not exist: the first write creates it. Picklable: connections are opened where it is used.

    `where` is an absolute path or a URI. `below` is the path below a URI; it is separate so that the URI's query stays
    at the end. Every error of the disk or the network is an `OSError`.
    """

    where: str
    below: str = ""

    @property
    def is_local(self) -> bool:
        """Whether the folder is a local path, where locks and renames work."""
        return "://" not in self.where

    @property
    def path(self) -> Path:
        """The path of a local folder."""
        assert self.is_local, f"{self} has no local path"
        return Path(self.where)

    @property
    def uri(self) -> str:
        """Path or URI, including secrets in the URI: `folder(uri)` gives this folder again."""
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
        # Names may come from untrusted tables and headers: none may point outside the folder.
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise ValueError(f"{given(name)}: no name of a file or folder in {self}")
        if self.is_local:
            return Folder(os.path.join(self.where, name))
        return Folder(self.where, f"{self.below}/{name}" if self.below else name)

    @refusing
    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if it does not exist."""
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
        """Size of a file in bytes (0 if the store does not tell), or None if there is no such plain file."""
        if self.is_local:
            local = self.path / name
            return local.stat().st_size if local.is_file() else None
        system, path = self._remote(name)
        handler = getattr(system, "handler", None)
        if isinstance(handler, fs.FSSpecHandler):
            handler.fs.invalidate_cache(path.rpartition("/")[0])  # else new files of other processes would be missed
        info = system.get_file_info(path)
        return (info.size or 0) if info.type == fs.FileType.File else None

    @refusing
    def write(self, name: str, *data: bytes | memoryview) -> None:
        """Write a file atomically from the concatenated parts, replacing an existing one."""
        if self.is_local:
            write_local(self.path, name, data)
            return
        system, path = self._remote(name)
        try:
            put(system, path, data)
        except FileNotFoundError:  # an object store never raises this: the file system has real folders
            system.create_dir(path.rpartition("/")[0], recursive=True)
            put(system, path, data)

    def touch(self, name: str) -> None:
        """Set a local file's time to now; does nothing on a remote folder or without permission."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.utime(self.path / name)

    def names(self) -> list[str]:
        """Names of the plain files, sorted, without hidden ones; empty if the folder does not exist."""
        return [name for name in self.sizes() if not name.startswith(".")]

    @refusing
    def sizes(self) -> dict[str, tuple[int, float | None]]:
        """Name → (bytes, modification time in seconds since 1970 or None) of all plain files, sorted by name."""
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
                # A temporary file may disappear meanwhile; a link to itself is not a file.
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
        return dict(sorted(found.items()))

    @refusing
    def folders(self) -> list["Folder"]:
        """The subfolders, sorted, without hidden ones and links; empty if the folder does not exist."""
        if self.is_local:
            names = [entry.name for entry in self._local_listing() if entry.is_dir(follow_symlinks=False)]
        else:
            names = [info.base_name for info in self._listing() if info.type == fs.FileType.Directory]
        return [self / name for name in sorted(names) if not name.startswith(".")]

    @refusing
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                (self.path / name).unlink()
            else:
                system, path = self._remote(name)
                system.delete_file(path)

    @refusing
    def clear(self, is_own: Callable[[str], bool]) -> list[str]:
        """Remove the plain files for whose names `is_own`, then the folder if it is empty; returns the names that stay.

        Leftovers of killed writes go too. Links and other non-plain files stay. If the folder itself is a link,
        everything stays.
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
            with contextlib.suppress(FileNotFoundError):  # in an object store the empty folder is gone already
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
            handler.fs.invalidate_cache(path)  # else files written by other processes meanwhile would be missed
        return system.get_file_info(fs.FileSelector(path, allow_not_found=True))


Where = str | Path | Folder


def folder(where: Where) -> Folder:
    """The folder at a path or URI. `ValueError` for a URI that neither pyarrow nor fsspec can open."""
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
    """The file system of a URI and the path in it, cached per process."""
    system, path = fs.FileSystem.from_uri(uri)
    return system, path.rstrip("/")


def in_one_line(error: BaseException) -> str:
    """The message of a disk or network error in one line, without secrets."""
    strerror = getattr(error, "strerror", None)
    return without_secrets(" ".join(str(strerror or error or type(error).__name__).split()))[:300]


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading. `OSError` for anything else: reading a pipe or a device could block."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "not a plain file", str(path))
    return open(number, "rb")


def write_local(parent: Path, name: str, data: Sequence[bytes | memoryview]) -> None:
    """`write_files` for one file."""
    write_files(parent, {name: data})


def write_files(parent: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    """Write all files under hidden temporary names in the same folder, with fsync, then rename them in order.

    After an error the old files are restored.
    """
    parent.mkdir(parents=True, exist_ok=True)

    def hidden(name: str) -> Path:
        # The process id alone is not unique: threads share it, and so may hosts with a shared disk.
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
                with contextlib.suppress(OSError):  # a new file, or a file system without hard links
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
    """Upload one object; after an error the object is removed."""
    stream = system.open_output_stream(path, compression=None)
    try:
        for part in data:
            stream.write(part)
        stream.close()
    except BaseException:
        # A pyarrow stream cannot be aborted from Python. Closing it may complete a partial upload: delete that.
        with contextlib.suppress(OSError):
            stream.close()
        with contextlib.suppress(OSError):
            system.delete_file(path)
        raise


def is_part(name: str) -> bool:
    """Whether a file name is a temporary name of `write` on a disk."""
    return PART_NAME.fullmatch(name) is not None


def is_leftover(name: str) -> bool:
    """Whether a file name is a leftover of a killed write or of a killed writability test."""
    return is_part(name) or PROBE_NAME.fullmatch(name) is not None
