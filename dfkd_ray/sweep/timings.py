"""Reads and writes the file of timings of a dry run: measured seconds per unit of work. For the command line.

A unit is known by what decides its seconds (`estimate.unit_of`): the teacher's hash and some fields of the config, not
seeds, sparsities, numbers of images or of steps. One dry run on a GPU machine serves many sweeps of the same teachers.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, Field

from dfkd_ray import storage
from dfkd_ray.config import STRICT, parsing, validate
from dfkd_ray.plain import cut, named
from dfkd_ray.sweep.estimate import Cost, Kind, Unit, Work

SCHEMA = "dfkd_ray.timings/1"


class Timings(BaseModel):
    """The contents of a file of timings: all of one kind of machine."""

    model_config = STRICT

    schema_version: str = SCHEMA
    package_version: str
    kind: Kind
    device: str = Field(description="model of the GPU, or instruction set of the CPU")
    numerics: str = Field(description="device and torch version")
    costs: dict[Unit, Cost]


def read(path: Path) -> Timings | None:
    """The timings in a file, None where there is no such file. `ValueError` for one that is no file of timings."""
    if not path.exists():
        return None
    data = parsing.parse_json(parsing.read_text(path), f"`timings` {named(path)}")
    found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
    if found != SCHEMA:
        raise ValueError(f"`timings` {path}: schema_version is {found!r}, this version reads {SCHEMA!r}")
    return validate(Timings, data, f"`timings` {path}")


def write(path: Path, timings: Timings) -> None:
    """Write timings whole."""
    storage.write_local(path.resolve().parent, path.name, [(timings.model_dump_json(indent=1) + "\n").encode()])


def lack(path: Path, timings: Timings, missing: Mapping[Unit, Work], num_units: int, here: str) -> ValueError:
    """The error for units that a file lacks and this machine, of numerics class `here`, cannot stand in for."""
    unit, one = next(iter(missing.items()))
    work, _, fields = unit.split(" ", 2)
    what = cut(f"{work} with {one.teacher.name} ({fields})", 60)
    more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
    return ValueError(
        f"`timings` {cut(str(path), 40)} lacks {len(missing)} of {num_units} units of work: {what}{more}; run this "
        f"dry run with it on a machine of its kind ({cut(timings.numerics, 50)}; this one: {cut(here, 30)})"
    )
