"""Standard output and error that take every write: what is shown must never decide what becomes of a command.

A reader that goes away (`| head -1`), a terminal that was closed, characters that the encoding lacks and a full disk
all raise in `print`, wherever it stands. Here the reader's leaving ends the printing in silence, characters are
replaced, and any other trouble is kept, to be told at the end.
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

# Nobody is there any more: the pipe's reader has ended, the terminal is closed, the descriptor is none.
GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.ENXIO, errno.EBADF}


class Outlet(io.RawIOBase):
    """The raw end of a stream, whose `write` never raises; `trouble` is the first error but for a reader that left."""

    def __init__(self, target: Any, name: str):
        """`target` takes bytes; None takes nothing, as where a stream was closed before the start."""
        self.target, self.name = target, name
        self.gone = target is None
        self.trouble: OSError | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal; a stream that was closed is none."""
        return self.target is not None and not self.target.closed and self.target.isatty()

    def fileno(self) -> int:
        """That of the stream below; `OSError` where it has none."""
        if self.target is None:
            raise io.UnsupportedOperation("fileno")
        return self.target.fileno()

    def write(self, data: Any) -> int:
        """Write all of it, or as much as goes; says that all of it went."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left.nbytes and not self.gone:
            try:
                num = self.target.write(left)
                if num is None:  # a pipe that does not wait, and is full
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
    """While open, `sys.stdout` and `sys.stderr` take every write; yields the raw end of the former.

    Streams that are the process's own stay so: what is printed while it ends must not raise either.
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
    """Open the null device on standard descriptors that are closed: another file would be given their numbers, and
    whatever a library prints would be written into it."""
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
    """The raw end of a stream made here."""
    return getattr(stream, "outlet", None)


def target_of(stream: Any) -> Any:
    """What takes the bytes of a text stream, below its buffer."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def stream_over(outlet: Outlet, like: Any) -> TextIO:
    """A text stream over a raw end, buffered as another is; where that was closed, a stream all the same."""
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
    """Let out what both streams hold."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def say(line: object, *, error: bool = False) -> None:
    """Print one line, on standard error if asked: whatever names in it hold, it stays one line of plain text."""
    print(shown(line), file=sys.stderr if error else sys.stdout, flush=True)
