"""Standard output and error whose writes never raise, so that output problems cannot fail a command.

A reader that ends (`| head -1`), a closed terminal, characters missing in the encoding and a full disk all make `print`
raise. Here, output after the reader's end is discarded silently, missing characters are replaced, and any other error
is stored and reported at the end.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from dfkd_ray.text import shown

# The reader is gone: the pipe's reader has ended, the terminal is closed, or the descriptor is invalid.
GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.ENXIO, errno.EBADF}


class Outlet(io.RawIOBase):
    """A raw stream whose `write` never raises; `trouble` is the first error, except for a reader that ended."""

    def __init__(self, target: Any, name: str):
        """`target` receives the bytes; None discards them, if the stream was closed before the start."""
        self.target, self.name = target, name
        self.gone = target is None
        self.trouble: OSError | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal; False for a closed stream."""
        return self.target is not None and not self.target.closed and self.target.isatty()

    def fileno(self) -> int:
        """The descriptor of the underlying stream; `OSError` if it has none."""
        if self.target is None:
            raise io.UnsupportedOperation("fileno")
        return self.target.fileno()

    def write(self, data: Any) -> int:
        """Write as much as possible; always returns the full length."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left.nbytes and not self.gone:
            try:
                num = self.target.write(left)
                if num is None:  # a non-blocking pipe that is full
                    select.select([], [self.target], [])
                left = left[num or 0 :]
            except OSError as error:
                if error.errno in GONE:
                    self.gone = True
                else:
                    self.trouble = self.trouble or error
                    break
            except ValueError:  # it was closed
                self.gone = True
        return size


@contextmanager
def forgiving() -> Iterator[Outlet]:
    """While open, writes to `sys.stdout` and `sys.stderr` never raise; yields the raw stream of `sys.stdout`.

    If they were the process's own streams they stay replaced, so that printing at exit does not raise either.
    """
    hold_descriptors()
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    outlets = {}
    for name, stream in before.items():
        outlet = outlets[name] = outlet_of(stream) or Outlet(target_of(stream), f"<{name}>")
        if outlet_of(stream) is None and (stream is None or hasattr(stream, "buffer")):
            setattr(sys, name, stream_over(outlet, stream))
    try:
        yield outlets["stdout"]
    finally:
        flush()
        for name, stream in before.items():
            if stream is not getattr(sys, f"__{name}__"):
                setattr(sys, name, stream)


def hold_descriptors() -> None:
    """Open the null device on closed standard descriptors. Otherwise another file would get their numbers, and output
    of libraries would be written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                null = os.open(os.devnull, os.O_RDWR)
                if null != number:
                    os.dup2(null, number)
                    os.close(null)


def outlet_of(stream: Any) -> Outlet | None:
    """The raw stream of a stream made by this module, or None."""
    return getattr(stream, "outlet", None)


def target_of(stream: Any) -> Any:
    """The raw byte stream below a text stream's buffer."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def stream_over(outlet: Outlet, like: Any) -> TextIO:
    """A text stream over a raw stream, buffered like another one, which may be closed."""
    with suppress(OSError, ValueError):
        if like is not None:
            like.flush()
    unbuffered = like is not None and like.write_through
    stream = io.TextIOWrapper(
        outlet if unbuffered else io.BufferedWriter(outlet),  # type: ignore[arg-type]
        encoding=getattr(like, "encoding", None) or "utf-8",
        errors="backslashreplace" if getattr(like, "errors", None) == "backslashreplace" else "replace",
        line_buffering=like is not None and like.line_buffering,
        write_through=unbuffered,
    )
    stream.mode = "w"  # type: ignore[attr-defined]
    stream.outlet = outlet  # type: ignore[attr-defined]
    return stream


def flush() -> None:
    """Flush both streams."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def say(line: object, *, error: bool = False) -> None:
    """Print one line, optionally on standard error; control characters and line ends in it are escaped."""
    print(shown(line), file=sys.stderr if error else sys.stdout, flush=True)
