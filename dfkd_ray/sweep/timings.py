"""Reads and writes JSON files of measured seconds per unit of work, to estimate sweeps for another kind of machine.

A unit is known by what decides its seconds (`estimate.synthesis_unit`, `estimate.trial_unit`): the teacher's hash and
some fields of the config. Seeds, sparsities, numbers of images and of steps are not among them, so one dry run on a
machine with the GPU serves many sweeps of the same teachers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from dfkd_ray import __version__, storage
from dfkd_ray.config import STRICT, parsing, validate
from dfkd_ray.plain import cut, named
from dfkd_ray.sweep.estimate import Calibration, Cost, Unit, unit_text

SCHEMA = "dfkd_ray.figures/1"


class Timing(BaseModel):
    """What one unit takes, one worker on its own. Seconds."""

    model_config = STRICT

    unit: dict[str, Any] = Field(description="`work` (synthesis or trial), `teacher_hash`, and the fields that decide")
    teacher: str = Field(description="the teacher's name, for readers")
    fixed_s: float = Field(ge=0, description="a batch, but for its steps")
    step_s: float = Field(ge=0, description="an optimiser step")
    image_s: float = Field(ge=0, description="an image once through a trial's network")
    scaled: bool = Field(default=False, description="timed on fewer images than the batch size, and scaled")


class Figures(BaseModel):
    """The contents of a file of figures: all of one kind of machine."""

    model_config = STRICT

    schema_version: str = SCHEMA
    package_version: str
    kind: Literal["GPU", "CPU core"]
    device: str = Field(description="model of the GPU, or instruction set of the CPU")
    numerics: str = Field(description="device and torch version")
    timings: tuple[Timing, ...]

    @model_validator(mode="after")
    def _each_unit_once(self) -> "Figures":
        texts = [unit_text(timing.unit) for timing in self.timings]
        twice = [text for text in dict.fromkeys(texts) if texts.count(text) > 1]
        if twice:
            raise ValueError(f"timings hold a unit twice: {twice[0]}")
        return self

    @property
    def costs(self) -> dict[Unit, Cost]:
        """Costs by unit of work."""
        return {unit_text(t.unit): Cost(t.fixed_s, t.step_s, t.image_s) for t in self.timings}


def read(path: Path) -> Figures | None:
    """The figures in a file, None where there is no such file. `ValueError` for one that is no file of figures."""
    if not path.exists():
        return None
    data = parsing.parse_json(parsing.read_text(path), f"--figures {named(path)}")
    found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
    if found != SCHEMA:
        raise ValueError(f"--figures {path}: schema_version is {found!r}, this version reads {SCHEMA!r}")
    return validate(Figures, data, f"--figures {path}")


def write(path: Path, figures: Figures) -> None:
    """Write figures whole."""
    storage.write_local(path.resolve().parent, path.name, [(figures.model_dump_json(indent=1) + "\n").encode()])


def extended(
    before: Figures | None,
    timed: Calibration,
    names: Mapping[Unit, str],
    kind: Literal["GPU", "CPU core"],
    machine: str,
) -> Figures:
    """The figures of before, if any, with what has been timed on a machine of the same numerics class, `machine`.

    `names` are the teachers' by unit.
    """
    assert before is None or (before.kind, before.numerics) == (kind, machine)
    new = tuple(
        Timing(
            unit=json.loads(unit),
            teacher=names[unit],
            fixed_s=cost.fixed_s,
            step_s=cost.step_s,
            image_s=cost.image_s,
            scaled=unit in timed.scaled,
        )
        for unit, cost in timed.costs.items()
    )
    return Figures(
        package_version=__version__,
        kind=kind,
        device=machine.rpartition(", torch ")[0],
        numerics=machine,
        timings=(*(before.timings if before else ()), *new),
    )


def lack(path: Path, figures: Figures, missing: Iterable[Unit], names: Mapping[Unit, str], here: str) -> ValueError:
    """The error for units that a file lacks and this machine, of numerics class `here`, cannot stand in for."""
    first, *others = missing
    fields = {name: value for name, value in json.loads(first).items() if value not in (None, False, {})}
    work = fields.pop("work")
    fields.pop("teacher_hash")
    what = cut(f"{work} with {names[first]} ({', '.join(f'{name} {value}' for name, value in fields.items())})", 60)
    more = f", and {len(others)} more" if others else ""
    return ValueError(
        f"--figures {cut(str(path), 40)} lacks {len(others) + 1} of {len(names)} units of work: {what}{more}; run this "
        f"dry run with it on a machine of its kind ({cut(figures.numerics, 50)}; this one: {cut(here, 30)})"
    )
