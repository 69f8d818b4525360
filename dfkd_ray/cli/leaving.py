"""Leaving at once, where Ray is gone: whatever waits for it in this process waits for ever."""

import os
import sys
from contextlib import suppress

from dfkd_ray.text import shown

SHOW_CURSOR = b"\x1b[?25h"  # hidden while a table is drawn


def at_once(reason: str) -> None:
    """Say in one line what happened, and end the process with exit code 3; nothing is waited for, nothing raises."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR + b"\n" if os.isatty(2) else b"") + f"error: {shown(reason)}\n".encode())
    os._exit(3)
