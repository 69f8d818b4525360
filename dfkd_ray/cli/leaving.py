"""Ends the process immediately when Ray is gone: threads that wait for Ray would wait forever."""

import os
import signal
import sys
from contextlib import suppress

from dfkd_ray.cli import live
from dfkd_ray.text import shown

SHOW_CURSOR = b"\x1b[?25h"  # hidden while a table is drawn


def at_once(reason: str) -> None:
    """Print one line and end the process with exit code 3, without waiting and without exceptions.

    Its child processes are killed too: some of Ray's processes would search for the others for minutes.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR + b"\n" if os.isatty(2) else b"") + f"error: {shown(reason)}\n".encode())
    for pid in live.descendants(os.getpid()):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(3)
