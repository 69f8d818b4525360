"""The `dfkd-ray` command: opens real data sets and hands them down, shows progress, prints.

torch and ray are imported inside the commands: `--help` stays fast. Errors are one line on stderr, and the exit code
says whose they are: 1 some trials failed, 2 wrong input, 3 the environment (disk, permission), 130 interrupted.
"""

import errno
import os
import sys

import typer
from typer.exceptions import TyperException

from dfkd_ray.cli import bench, cache, plan, report, results, run, synthesize, teacher

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
app.command()(results.results)
app.command()(report.report)
app.command()(plan.schema)
app.command()(synthesize.synthesize)
app.add_typer(teacher.app, name="teacher")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run the command line; every expected error becomes one line and an exit code."""
    # Read when Ray is imported: its reports of processes that died would cut through what is shown. Rows tell of them.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:
        fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)  # type: ignore[attr-defined]
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(environment_error(error), 3)
    except FloatingPointError as error:
        fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; the same command goes on from what is on disk", 130)


def fail(message: str, code: int) -> None:
    """Print the lines of an error and leave; no URI that was given with a password shows it."""
    from dfkd_ray.storage import without_secrets

    for line in message.splitlines():
        print(f"error: {without_secrets(line)}", file=sys.stderr)
    sys.exit(code)


def environment_error(error: OSError) -> str:
    """One line for a disk, permission or network error."""
    hint = {
        errno.ENOSPC: "free some space",
        errno.EACCES: "check the permissions",
        errno.EROFS: "choose another folder",
    }
    advice = hint.get(error.errno or 0)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}" + (f"; {advice}, then run the same command again" if advice else "")
