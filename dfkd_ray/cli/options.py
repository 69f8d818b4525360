"""Options that several commands share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dfkd_ray import config as configs
from dfkd_ray.plain import alike, given, named, value_at

MOST_SYNTHESIZERS = 100_000

TeacherName = Annotated[
    str,
    typer.Argument(
        help="bundle folder, its URI (s3://, gs://, …), bundled teacher, or a library's network (timm:NAME, "
        "hf-hub:OWNER/NAME, torchvision:NAME)"
    ),
]
DataRoot = Annotated[Path, typer.Option(help="folder with data sets", envvar="DFKD_RAY_DATA")]
Download = Annotated[bool, typer.Option(help="fetch a missing data set, or missing weights of a library's network")]
Set = Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE over the config, repeatable")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code", help="a module whose code a bundle may import, or a package with all below it; repeatable"
    ),
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
Effort = Annotated[
    configs.Effort | None,
    typer.Option(help="fast: a first answer; standard: the defaults; thorough: a night's work"),
]


def settled(
    data: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    assignments: Sequence[str] | None,
    file: object = "",
) -> dict[str, Any]:
    """A file's nested data, overridden by the command line.

    `options`: option → dotted field → value, None for an option that is not given. `ValueError` if an option and
    `--set` give one field two values, or if the command line and the file name two teachers.
    """
    overrides = configs.parse_overrides(assignments or [])
    chosen: dict[str, Any] = {}
    for option, fields in options.items():
        for name, value in fields.items():
            if value is None:
                continue
            for other, what in said_of(name, value, overrides):
                if not alike(what, value_at(value, other[len(name) + 1 :]) if len(other) > len(name) else value):
                    raise ValueError(
                        f"{option} {given(value)} and --set {named(other)}={given(what)}: two values for one field; "
                        "leave one out"
                    )
            chosen[name] = value
    named_here, named_there = chosen.get("teacher"), data.get("teacher")
    if named_here is not None and named_there is not None and named_here != named_there:
        raise ValueError(
            f"two teachers: {given(named_here)} on the command line, {given(named_there)} in {named(file)}; "
            "leave one out"
        )
    # Fields within a section are applied after the section.
    together = sorted((overrides | chosen).items(), key=lambda item: item[0].count("."))
    return configs.with_overrides(data, dict(together))


def said_of(name: str, value: Any, overrides: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, value) of the overrides for a field or for parts of it."""
    found = [(other, what) for other, what in overrides.items() if other == name]
    found += [
        (other, what)
        for other, what in overrides.items()
        if other.startswith(name + ".") and value_at(value, other[len(name) + 1 :]) is not None
    ]
    sections = [(other, name[len(other) + 1 :]) for other in overrides if name.startswith(other + ".")]
    inner = [(name, value_at(overrides[other], rest)) for other, rest in sections]
    return found + [(other, what) for other, what in inner if what is not None]


def number_of(text: str) -> int:
    """The number in `--synthesizers`."""
    return number_within(text, "expected auto, or a number")


def number_within(text: str, expected: str) -> int:
    """A whole number from 0 to `MOST_SYNTHESIZERS`."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"--synthesizers {given(text)}: {expected}")
    if len(text) > 9 or int(text) > MOST_SYNTHESIZERS:
        raise ValueError(f"--synthesizers {given(text)}: expected at most {MOST_SYNTHESIZERS:,}")
    return int(text)


def range_of(text: str) -> int | tuple[int, int] | None:
    """`--synthesizers` of a sweep: None for auto, a number, or the fewest and the most."""
    if text == "auto":
        return None
    expected = "expected auto, a number, or a range like 1-64"
    numbers = text.split("-")
    if len(numbers) > 2:
        raise ValueError(f"--synthesizers {given(text)}: {expected}")
    fewest, *more = (number_within(number, expected) for number in numbers)
    if not more:
        return fewest
    most = more[0]
    if not 1 <= fewest <= most:
        raise ValueError(f"--synthesizers {text}: expected MIN-MAX with a MIN of at least 1 that is not above MAX")
    return fewest, most
