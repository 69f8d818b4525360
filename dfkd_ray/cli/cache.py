"""`dfkd-ray cache`: list, verify and prune a batch cache."""

import contextlib
import math
import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfkd_ray.cli.streams import say
from dfkd_ray.text import shown

if TYPE_CHECKING:
    from dfkd_ray.cache_entries import Entry
    from dfkd_ray.storage import Folder

app = typer.Typer(no_args_is_help=True, help="The batch cache: ls, verify, prune.")

Cache = Annotated[
    str | None, typer.Option(help="folder or URI (s3://, gs://, fsspec+...://); without it the default cache")
]
UNITS = {"": 1, **{f"{letter}B": 1000**n for n, letter in enumerate(("", "K", "M", "G", "T"))}}
UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}
NUM_SHOWN = 12  # hex digits of a key: enough for --key


@app.command("ls")
def list_entries(cache: Cache = None) -> None:
    """List the keys with teacher, method, number of batches, size and last use."""
    from dfkd_ray import cache_entries

    root = open_root(cache)
    found = cache_entries.entries(root)
    if found:
        print_table(found)
    for entry in found:
        if entry.problem:
            say(f"{entry.folder}: cannot be looked into: {entry.problem}")
    num_batches, size = sum(entry.num_batches for entry in found), sum(entry.size_bytes for entry in found)
    say(f"{root}: {count(len(found), 'key')}, {count(num_batches, 'batch')}, {size_text(size)}")


@app.command("verify")
def verify(
    cache: Cache = None,
    remove: Annotated[bool, typer.Option("--remove", help="remove what is damaged: it is made again on use")] = False,
) -> None:
    """Read every batch and compare its checksum; exit code 1 if a damaged file stays."""
    from dfkd_ray import cache_entries

    root = open_root(cache)
    num_damaged = num_staying = 0
    for finding in cache_entries.verify(root, remove):
        num_damaged += finding.damaged
        num_staying += finding.damaged and not finding.removed
        where = finding.entry.folder / finding.name if finding.name else finding.entry.folder
        say(f"{where}: {finding.problem}{'; removed' if finding.removed else ''}")
    num_batches = sum(entry.num_batches for entry in cache_entries.entries(root))
    say(f"{root}: {count(num_batches, 'batch')} in it, {num_damaged} damaged found, {num_staying} left")
    if num_staying:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    cache: Cache = None,
    key: Annotated[list[str] | None, typer.Option(help="only keys that begin so, repeatable")] = None,
    older_than: Annotated[float | None, typer.Option(help="not used for so many days")] = None,
    max_size: Annotated[str | None, typer.Option(help="longest unused first, until the rest is so large: 2GB")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be removed, remove nothing")] = False,
) -> None:
    """Remove whole keys: the named ones, those unused for long, or the longest unused until the rest is small enough.

    Do not use it while a run uses the cache: the run would make its batches again. --key restricts the other options.
    """
    if not key and older_than is None and max_size is None:
        raise ValueError("cache prune: say what to remove, with --key, --older-than or --max-size")
    if older_than is not None and not (math.isfinite(older_than) and older_than >= 0):
        raise ValueError(f"--older-than {older_than}: expected a number of days, 0 or more")
    max_bytes = None if max_size is None else parse_size(max_size)
    from dfkd_ray import cache_entries

    root = open_root(cache)
    removed = cache_entries.prune(
        root, keys=key or (), older_than_days=older_than, max_bytes=max_bytes, dry_run=dry_run
    )
    verb = "would remove" if dry_run else "removed"
    for entry in removed:
        if entry.problem:
            say(f"not removed: {entry.folder}: {entry.problem}")
        else:
            say(f"{verb} {entry.folder}: {count(entry.num_batches, 'batch')}, {size_text(entry.size_bytes)}")
    gone = [entry for entry in removed if not entry.problem]
    say(f"{root}: {verb} {count(len(gone), 'key')}, {size_text(sum(entry.size_bytes for entry in gone))}")
    if len(gone) < len(removed):
        raise typer.Exit(1)


def open_root(where: str | None) -> "Folder":
    """The folder of `--cache`, or the default one."""
    from dfkd_ray import cache, storage

    return storage.folder(cache.default_folder() if where is None else where)


def print_table(found: "list[Entry]") -> None:
    """One line per key."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("key", "teacher", "method/domain", "batches", "size", "numerics", "last used"):
        table.add_column(heading, justify="right" if heading in ("batches", "size") else "left", no_wrap=True)
    for entry in found:
        table.add_row(*(Text(shown(cell)) for cell in cells_of(entry)))
    console = Console()
    # In a pipe the table keeps its full width: cut columns would be useless.
    console.width = max(console.width, console.measure(table).maximum if console.is_terminal else 160)
    console.print(table)


def cells_of(entry: "Entry") -> list[str]:
    """One line of the table; without a manifest, `-` in its columns, and the hash of the numerics class."""
    manifest: dict[str, Any] = entry.manifest or {}
    config = manifest.get("config")
    method = config.get("method", "-") if isinstance(config, dict) else "-"
    what = f"{method}/{manifest.get('domain', '-')}" if manifest else "-"
    numerics = manifest.get("numerics") or entry.folder.name.rpartition("-")[2]
    used = "-"
    if entry.last_used is not None:
        with contextlib.suppress(ValueError, OverflowError, OSError):  # a time outside the calendar
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
    size = size_text(entry.size_bytes)
    return [entry.key[:NUM_SHOWN], manifest.get("teacher", "-"), what, str(entry.num_batches), size, numerics, used]


def parse_size(text: str) -> int:
    """Bytes of `2GB`, `1.5 GiB` or `500000`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"--max-size {text!r}: expected a number of bytes, or one with kB, MB, GB, TB, MiB, GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size_text(num_bytes: int) -> str:
    """Bytes with a decimal unit."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"
