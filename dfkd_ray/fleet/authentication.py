"""Token authentication of Ray sessions: checks the user's RAY_AUTH_* variables, and sets a private token by default.

Ray reads an empty or misspelt RAY_AUTH_MODE as "no token": then anyone who reaches a port can run code as this user.
"""

import importlib
import os
import secrets
from typing import Any

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
MODES = ("token", "disabled")
# The token of the sessions that this process starts. Without it nobody can run code in them or read from them.
OWN = secrets.token_hex(32)
SHOWN = 40  # characters of an invalid mode in an error message


def settle() -> None:
    """Normalise the variables for Ray: remove empty ones, lower-case the mode. `ValueError` for an unknown mode."""
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
    raylet.Config.initialize("")  # Ray read the variables at import: read them again


def use_own_token() -> None:
    """Set our token for a local session, unless the user has chosen a mode; Ray then enables token authentication."""
    if MODE not in os.environ:
        os.environ[TOKEN] = OWN
