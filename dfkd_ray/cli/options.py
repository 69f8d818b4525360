"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

TeacherName = Annotated[str, typer.Argument(help="bundle folder, its URI (s3://, gs://, …), or bundled teacher")]
DataRoot = Annotated[Path, typer.Option(help="folder with data sets", envvar="DFKD_RAY_DATA")]
Download = Annotated[bool, typer.Option(help="fetch a missing data set")]
Set = Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE over the config, repeatable")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust-code", help="a module whose code a bundle may import, repeatable")
]
TestData = Annotated[
    str,
    typer.Option(
        help="for reporting only: auto (bundled, where there is one), none, validation (held out of training), "
        "or a data set's name or folder"
    ),
]


def folder_here(text: str) -> Path:
    """The path of a folder on this machine, where checkpoints can be renamed and images streamed to."""
    if "://" in text:
        raise typer.BadParameter(f"{text}: expected a folder on this machine; copy it there afterwards")
    return Path(text)


Out = Annotated[Path, typer.Option(help="folder to write", parser=folder_here, metavar="PATH")]
BundleOut = Annotated[str, typer.Option(help="folder to write, or its URI (s3://, gs://, …)")]
Cache = Annotated[str | None, typer.Option(help="folder or URI (s3://, gs://, …) where synthesised batches are kept")]
Address = Annotated[
    str | None,
    typer.Option(help="of a running Ray cluster: HOST:PORT, or auto for one on this machine; else Ray starts here"),
]
Synthesizers = Annotated[
    str, typer.Option(help="auto (as many as there are GPUs, or cores; grows with the cluster), or a number")
]
SweepSynthesizers = Annotated[
    str,
    typer.Option(
        help="auto (as many as there are GPUs, or cores; grows with the cluster), a number, or MIN-MAX: more while "
        "images are waited for, fewer when idle, on machines that an autoscaler launches and takes back"
    ),
]
GpusPerSynthesizer = Annotated[float | None, typer.Option(help="a fraction, or whole GPUs; default 0.5")]
BatchTimeout = Annotated[
    float, typer.Option(min=1.0, help="seconds after which a batch that is being made is given to another synthesizer")
]


def number_of(text: str) -> int:
    """The number in `--synthesizers`."""
    if not text.isdigit():
        raise ValueError(f"--synthesizers {text!r}: expected auto, or a number")
    return int(text)


def range_of(text: str) -> int | tuple[int, int] | None:
    """`--synthesizers` of a sweep: None for auto, a number, or the fewest and the most."""
    if text == "auto":
        return None
    numbers = text.split("-")
    if not all(number.isdecimal() for number in numbers) or len(numbers) > 2:
        raise ValueError(f"--synthesizers {text!r}: expected auto, a number, or a range like 1-64")
    if len(numbers) == 1:
        return int(text)
    fewest, most = map(int, numbers)
    if not 1 <= fewest <= most:
        raise ValueError(f"--synthesizers {text}: expected MIN-MAX with a MIN of at least 1 that is not above MAX")
    return fewest, most
