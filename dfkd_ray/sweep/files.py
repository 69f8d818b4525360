"""A sweep file → validated trial configs → jobs with their teachers open. Nothing starts here.

A sweep is `base` (a trial config), `grid` (dotted field → list of values; a list of such grids is their union),
`seeds` (a number: that many seeds of synthesis and distillation), `tiny` (a small override) and `about`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from dfkd_ray import trial as one_trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import STRICT, SYNTHESIS_CONFIGS, TrialConfig, validate, with_overrides

SEED_FIELDS = ("synthesis.seed", "distillation.seed")


class About(BaseModel):
    """What a reader wants to know before starting a sweep."""

    model_config = STRICT

    source: str
    command: str
    cost: str
    expected: str


class SweepConfig(BaseModel):
    """The contents of a sweep file."""

    model_config = STRICT

    about: About
    base: dict[str, Any] = Field(default_factory=dict, description="a trial config; what it leaves out has defaults")
    grid: dict[str, list[Any]] | list[dict[str, list[Any]]] = Field(description="dotted field → values; or several")
    seeds: int = Field(
        default=1, ge=1, description="seeds 0 … n - 1 of synthesis and distillation for every combination"
    )
    tiny: dict[str, Any] = Field(default_factory=dict, description="dotted field → value, for --tiny")


@dataclass(frozen=True)
class Job:
    """One trial of a sweep, with what it needs."""

    config: TrialConfig
    teacher: Teacher
    id: str


def expand(sweep: SweepConfig, overrides: Mapping[str, Any], *, tiny: bool = False) -> list[TrialConfig]:
    """Every trial config of a sweep, in order, each once. `ValueError` with all errors of all combinations at once.

    `overrides` (dotted) win over `base`; an override of a grid's own field is an error. `tiny` wins over grid and seeds
    too: an axis that it fixes has one value, and points that thereby become equal are one trial.
    """
    grids = sweep.grid if isinstance(sweep.grid, list) else [sweep.grid]
    small = sweep.tiny if tiny else {}
    fixed = {**small, **overrides}
    configs: dict[str, TrialConfig] = {}
    errors: dict[str, None] = {}
    for grid in grids:
        clash = sorted(set(grid) & set(overrides))
        if clash:
            raise ValueError(f"--set {clash[0]}: the sweep's grid varies this field; change the grid instead")
        axes = [[(name, value) for value in values] for name, values in grid.items()]
        for combination in itertools.product(*axes):
            for seed in range(sweep.seeds):
                point = dict(combination)
                if sweep.seeds > 1:
                    point |= dict.fromkeys(SEED_FIELDS, seed)
                try:
                    data = with_overrides(sweep.base, point)
                    extra = {k: v for k, v in fixed.items() if (k in small or k not in point) and applies(k, data)}
                    config = validate(TrialConfig, with_overrides(data, extra), "sweep")
                    configs.setdefault(config.model_dump_json(), config)
                except ValueError as error:
                    errors |= dict.fromkeys(str(error).splitlines())
    if errors:
        raise ValueError("\n".join(errors))
    return list(configs.values())


def applies(name: str, data: Mapping[str, Any]) -> bool:
    """Whether an override is meant for this combination: another synthesis method's fields are not."""
    parent, _, leaf = name.partition(".")
    if parent != "synthesis":
        return True
    own = SYNTHESIS_CONFIGS[dict(data.get("synthesis", {})).get("method", "deepinversion")].model_fields
    return leaf in own or not any(leaf in other.model_fields for other in SYNTHESIS_CONFIGS.values())


def plan(
    configs: Sequence[TrialConfig], open_teacher: Callable[[str], Teacher], trust_code: Sequence[str] = ()
) -> list[Job]:
    """Open every teacher once, name and check every trial. `ValueError` with all that cannot run."""
    teachers: dict[str, Teacher] = {}
    errors = []
    for name in dict.fromkeys(config.teacher for config in configs):
        try:
            teachers[name] = open_teacher(name)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    jobs = {}
    for config in configs:
        teacher = teachers[config.teacher]
        name = one_trial.trial_id(config, teacher)
        jobs.setdefault(name, Job(config, teacher, name))
        try:
            one_trial.check(config, teacher, trust_code)
        except ValueError as error:
            errors.append(f"{config.teacher}: {error}")
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))
    return list(jobs.values())
