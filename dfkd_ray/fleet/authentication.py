"""Who may talk to a Ray session: what the user's variables say, read strictly, and a token of our own where they say
nothing.

Ray takes an empty or misspelt RAY_AUTH_MODE for "no token": then whoever reaches a port runs code as this user.
"""

import importlib
import os
import secrets
from typing import Any

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
MODES = ("token", "disabled")
# Of the sessions that this process starts: whoever does not know it can neither run code in them nor read from them.
OWN = secrets.token_hex(32)
SHOWN = 40  # characters of a mode that is none


def settle() -> None:
    """Make the variables what Ray understands: empty ones are absent, the mode is written as Ray writes it.

    `ValueError` for an unknown mode.
    """
    for name in (MODE, TOKEN, TOKEN_PATH):
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]
    given = os.environ.get(MODE)
    if given is not None:
        mode = given.strip().lower()
        if mode not in MODES:
            shown = given if len(given) <= SHOWN else given[:SHOWN] + "…"
            raise ValueError(
                f"{MODE} {shown!r}: expected {' or '.join(MODES)}; unset it for a token that is this sweep's own"
            )
        os.environ[MODE] = mode
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")  # Ray has read the variables when it was imported


def use_own_token() -> None:
    """Where the user has not chosen a mode, a local session has our token: Ray turns tokens on by itself then."""
    if MODE not in os.environ:
        os.environ[TOKEN] = OWN
