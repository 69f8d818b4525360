"""Leaving at once, where Ray is gone: whatever waits for it in this process waits for ever."""

import os
import signal
import sys
from contextlib import suppress

from dfkd_ray.cli import live
from dfkd_ray.text import shown

SHOW_CURSOR = b"\x1b[?25h"  # hidden while a table is drawn


def at_once(reason: str) -> None:
    """Say in one line what happened, and end the process with exit code 3; nothing is waited for, nothing raises.

    What it has started ends with it: some of Ray's processes would look for the others for minutes.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR + b"\n" if os.isatty(2) else b"") + f"error: {shown(reason)}\n".encode())
    for pid in live.descendants(os.getpid()):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(3)
