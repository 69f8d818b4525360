"""The `dfkd-ray` command line: only this package opens real data sets for trials, shows progress and prints.

torch and ray are imported inside the commands, so that `--help` is fast. Errors are short lines on stderr. Exit codes:
1 some trials failed, 2 wrong input, 3 an error of the environment (disk, permission) or an unexpected one, 130
interrupted.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from dfkd_ray.cli import (
    bench,
    cache,
    dry_run,
    errors,
    export,
    report,
    results,
    run,
    shrink,
    streams,
    synthesize,
    teacher,
)
from dfkd_ray.text import shown

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make trained networks small without their training data.\n\n"
    "Start with `dfkd-ray sweep sweeps/quickstart.yaml`, or one trial: "
    "`dfkd-ray recover fashion_mnist_resnet20 --sparsity 0.75 --out runs/first`.",
)
app.command()(run.recover)
app.command()(run.sweep)
app.command()(shrink.shrink)
app.command()(results.results)
app.command()(report.report)
app.command()(dry_run.schema)
app.command()(synthesize.synthesize)
app.command()(export.export)
app.add_typer(teacher.app, name="teacher")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="before the command: show the traceback of an error on standard error")
    ] = False,
) -> None:
    """Options before the command; `outcome` reads them."""


def main() -> None:
    """Run the command line. Every error becomes short lines and an exit code; errors of the output never raise."""
    # Read when Ray is imported. Its messages about dead processes would disturb the display; rows have the reason.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    with streams.forgiving() as out, last_resorts():
        code = outcome()
        streams.flush()
        if out.trouble is not None:
            line = errors.environment_error(out.trouble)
            code = errors.fail(f"standard output: {line}", code or 3)
    sys.exit(code)


def outcome() -> int:
    """Run the command of the command line; returns the exit code."""
    context = None
    try:
        # Not `app()`: typer handles broken pipes, end of file and Ctrl-C in its own way.
        with typer.main.get_command(app).make_context("dfkd-ray", sys.argv[1:]) as context:
            context.command.invoke(context)
        return 0
    except BaseException as error:  # noqa: BLE001 - nothing may leave a traceback on a terminal
        debug = bool(context and context.params.get("debug"))
        return errors.end(error, debug, options_of(context.command, sys.argv[1:]) if context else ())


def options_of(command: Any, words: Sequence[str]) -> list[str]:
    """The long options of the command that the words of a command line name."""
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return [option for parameter in command.params for option in parameter.opts if option.startswith("--")]


@contextmanager
def last_resorts() -> Iterator[None]:
    """While open, SIGHUP acts as Ctrl-C unless it is ignored (nohup), and exceptions of threads and log messages are
    printed as plain lines."""
    hook, threading.excepthook = threading.excepthook, errors.in_thread
    resort = logging.lastResort
    formatter = resort.formatter if resort else None
    if resort:
        resort.setFormatter(Plain())
    before = None
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    finally:
        threading.excepthook = hook
        if resort:
            resort.setFormatter(formatter)
        if before is not None:
            signal.signal(signal.SIGHUP, before)


class Plain(logging.Formatter):
    """A log formatter that makes foreign text safe for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, in one line."""
        return shown(record.getMessage())
