"""How a command ends that does not end well: short lines on standard error, and an exit code.

What nobody expected ends in a line too; its traceback is kept in a file of the state folder. That is a net below the
errors that are shown where they arise: its lines say `unexpected error`, and its exit code is the environment's.
"""

import errno
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from dfkd_ray.cli.streams import say
from dfkd_ray.text import shortened, shown

MOST_LINES = 40
MOST_SIGNS = 300  # of a line
MOST_FILES = 20  # of tracebacks; the oldest go
PARAMETER = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")
INTERRUPTED = "interrupted; the same command goes on from what is on disk"
# What the disk or the system says, and what to do about it.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "check the permissions",
    errno.EROFS: "choose another folder",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
}


def end(error: BaseException, debug: bool = False, options: Sequence[str] = ()) -> int:
    """Say in lines what has ended a command; returns its exit code. `debug` shows the traceback before them.

    `options` of the command, as in "--data-root": parameters that the message names are written like them.
    """
    if debug and not isinstance(error, TyperException | typer.Exit):
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(without_secrets(line), error=True)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return left(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort) or type(error).__name__ == "BdbQuit":  # out of a debugger
        return fail(INTERRUPTED, 130)
    if isinstance(error, TyperException):
        message = error.format_message()
        return fail(message, 2) if message else 2  # without words: the help has been printed
    if isinstance(error, ValueError):
        return fail(with_options(str(error), options) or type(error).__name__, 2)
    if isinstance(error, OSError):
        return fail(with_options(environment_error(error), options), 3)
    if isinstance(error, FloatingPointError):
        return fail(str(error) or type(error).__name__, 1)
    return fail(unexpected(error), 3)


def with_options(message: str, options: Sequence[str]) -> str:
    """A message of the package, which names parameters as Python does (`data_root`, `gpus=2`), for the command line."""

    def option(match: re.Match[str]) -> str:
        name, value = "--" + match[1].replace("_", "-"), match[2]
        if name not in options:
            return match[0]
        return name if value is None else f"{name} {value}"

    return PARAMETER.sub(option, message)


def left(error: SystemExit) -> int:
    """The exit code of who left by `sys.exit`; a text is a message, as Python has it."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    return fail(str(error.code), 1)


def fail(message: str, code: int) -> int:
    """Print the lines of an error, shortened, without secrets and signs that act on a terminal; returns `code`."""
    for word in sys.argv[1:]:  # a name that was given may have line ends of its own
        message = message if word.isprintable() else message.replace(word, shown(word))
    lines = [without_secrets(line) for line in message.split("\n") if line.strip()] or ["no message"]
    for line in lines[:MOST_LINES]:
        say(shortened(shown(f"error: {line}"), MOST_SIGNS), error=True)
    if len(lines) > MOST_LINES:
        say(f"error: and {len(lines) - MOST_LINES} more", error=True)
    return code


def without_secrets(line: str) -> str:
    """As `storage.without_secrets`; where that cannot be loaded any more, as it is."""
    try:
        from dfkd_ray import storage

        return storage.without_secrets(line)
    except Exception:  # noqa: BLE001 - an error is being shown, out of memory perhaps: another must not hide it
        return line


def environment_error(error: OSError) -> str:
    """One line for a disk, permission or network error."""
    advice = ADVICE.get(error.errno or 0)
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) and error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    return f"{where}{what}" + (f"; {advice}, then run the same command again" if advice else "")


def unexpected(error: BaseException, where: str = "") -> str:
    """One line for an error that nobody expected; its traceback is written to a file, which the line names."""
    try:
        what = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # noqa: BLE001 - an error whose text raises is shown by its name
        what = type(error).__name__
    kept = keep_traceback(error)
    room = MOST_SIGNS - len(f"error: unexpected error{where}: ; {kept}")
    return f"unexpected error{where}: {shortened(shown(without_secrets(what)), max(room, 40))}; {kept}"


def keep_traceback(error: BaseException) -> str:
    """Write a traceback to a new file of the state folder; says where it is, or why it is nowhere."""
    try:
        folder = state_folder() / "errors"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}-{os.getpid()}.txt"
        text = "".join(traceback.format_exception(error))
        head = f"{shown(' '.join(sys.argv))}\n{platform.platform()}, Python {platform.python_version()}\n\n"
        lines = [shown(without_secrets(line), keep="\t") for line in (head + text).split("\n")]
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
            opened.write("\n".join(lines))
        for old in sorted(folder.glob("*-*-*-*.txt"))[:-MOST_FILES]:
            old.unlink(missing_ok=True)
        return f"traceback: {shown(file)}"
    except Exception as problem:  # noqa: BLE001 - the error itself is what has to be shown
        why = getattr(problem, "strerror", None) or problem
        return f"its traceback could not be written ({shown(why)}): add --debug before the command to see it"


def state_folder() -> Path:
    """Where programs keep such things for their user: `$XDG_STATE_HOME/dfkd_ray`, or below `~/.local/state`."""
    given = os.environ.get("XDG_STATE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path("~/.local/state").expanduser()
    return root / "dfkd_ray"


def in_thread(args: Any) -> None:
    """As `threading.excepthook`: the command goes on, the traceback is kept."""
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        error: BaseException = args.exc_value
        say(shortened(f"note: {unexpected(error, ' beside the command')}", MOST_SIGNS), error=True)
