"""Turns exceptions into short lines on standard error and an exit code.

An unexpected exception also becomes one line, with the words `unexpected error`, and has exit code 3. Its traceback
is written to a file in the state folder.
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
PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
INTERRUPTED = "interrupted; the same command goes on from what is on disk"
# Error number of the system → advice.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "check the permissions",
    errno.EROFS: "choose another folder",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
}


def end(error: BaseException, debug: bool = False, options: Sequence[str] = ()) -> int:
    """Print the error that ended a command; returns the exit code. `debug` prints the traceback first.

    `options` are those of the command, such as "--data-root": parameters in the message are written as options.
    """
    if debug and not isinstance(error, TyperException | typer.Exit):
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(without_secrets(line), error=True)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, Exception | SystemExit) and (reason := of_network(error)):
        return fail(reason, 2)
    if isinstance(error, SystemExit):
        return left(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort) or type(error).__name__ == "BdbQuit":  # from a debugger
        return fail(INTERRUPTED, 130)
    if isinstance(error, TyperException):
        message = all_missing(error) or error.format_message()
        return fail(message, 2) if message else 2  # without a message: the help has been printed
    if isinstance(error, ValueError):
        return fail(with_options(str(error), options) or type(error).__name__, 2)
    if isinstance(error, OSError):
        return fail(with_options(environment_error(error), options), 3)
    if isinstance(error, FloatingPointError):
        return fail(str(error) or type(error).__name__, 1)
    return fail(unexpected(error), 3)


def all_missing(error: TyperException) -> str:
    """A line that names all missing options and arguments of a command; empty for another error.

    The parser raises at the first one, after it has read those that are given.
    """
    context: Any = getattr(error, "ctx", None)
    if type(error).__name__ != "MissingParameter" or context is None:
        return ""
    kind: Any = type(error)
    missing = [one for one in context.command.params if one.required and one.name not in context.params]
    return " ".join(kind(ctx=context, param=one).format_message() for one in missing)


def with_options(message: str, options: Sequence[str]) -> str:
    """A message of the package, which names parameters as Python does (`data_root`, `gpus=2`), for the command line."""

    def option(match: re.Match[str]) -> str:
        name, value = "--" + match[1].replace("_", "-"), match[2]
        if name not in options:
            return match[0]
        return name if value is None else f"{name} {value}"

    return PARAMETER.sub(option, message)


def of_network(error: BaseException) -> str:
    """What an exception that the user's network raised says; empty for another one."""
    if "torch" not in sys.modules or isinstance(error, MemoryError | FloatingPointError | TyperException):
        return ""
    from dfkd_ray.models.checks import raised_by_network
    from dfkd_ray.untrusted import reason

    return f"the network's own forward raised {reason(error)}" if raised_by_network(error) else ""


def left(error: SystemExit) -> int:
    """The exit code of a `SystemExit`; a text is printed as the message, as Python does."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    return fail(str(error.code), 1)


def fail(message: str, code: int) -> int:
    """Print an error's lines, shortened, without secrets and terminal control characters; returns `code`."""
    for word in sys.argv[1:]:  # an argument may contain line ends
        message = message if word.isprintable() else message.replace(word, shown(word))
    lines = [without_secrets(line) for line in message.split("\n") if line.strip()] or ["no message"]
    for line in lines[:MOST_LINES]:
        say(shortened(shown(f"error: {line}"), MOST_SIGNS), error=True)
    if len(lines) > MOST_LINES:
        say(f"error: and {len(lines) - MOST_LINES} more", error=True)
    return code


def without_secrets(line: str) -> str:
    """As `storage.without_secrets`; the line unchanged if that cannot be imported any more."""
    try:
        from dfkd_ray import storage

        return storage.without_secrets(line)
    except Exception:  # noqa: BLE001 - while reporting an error, perhaps out of memory, another one must not hide it
        return line


def environment_error(error: OSError) -> str:
    """One line for a disk, permission or network error."""
    advice = ADVICE.get(error.errno or 0)
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) and error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    return f"{where}{what}" + (f"; {advice}, then run the same command again" if advice else "")


def unexpected(error: BaseException, where: str = "") -> str:
    """One line for an unexpected error; it names the file with the traceback."""
    try:
        what = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # noqa: BLE001 - if the error's text raises, its type is shown
        what = type(error).__name__
    kept = keep_traceback(error)
    room = MOST_SIGNS - len(f"error: unexpected error{where}: ; {kept}")
    return f"unexpected error{where}: {shortened(shown(without_secrets(what)), max(room, 40))}; {kept}"


def keep_traceback(error: BaseException) -> str:
    """Write a traceback to a new file in the state folder; returns a text with its path, or why there is none."""
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
    except Exception as problem:  # noqa: BLE001 - the original error must be reported
        why = getattr(problem, "strerror", None) or problem
        return f"its traceback could not be written ({shown(why)}): add --debug before the command to see it"


def state_folder() -> Path:
    """The user's state folder: `$XDG_STATE_HOME/dfkd_ray`, or `~/.local/state/dfkd_ray`."""
    given = os.environ.get("XDG_STATE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path("~/.local/state").expanduser()
    return root / "dfkd_ray"


def in_thread(args: Any) -> None:
    """A `threading.excepthook`: the command continues, and the traceback is written to a file."""
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        error: BaseException = args.exc_value
        say(shortened(f"note: {unexpected(error, ' beside the command')}", MOST_SIGNS), error=True)
