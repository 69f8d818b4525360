"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
Out = Annotated[Path, typer.Option(help="folder to write")]
