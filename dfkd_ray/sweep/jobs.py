"""Turns a sweep file into a plan: validated jobs, each a trial config with its loaded teacher. Nothing is started.

A sweep file has `base` (a trial config) and either `grid` (dotted field → list of values; a list of grids is their
union) or `search` (dotted field → domain). Optional are `effort` (fields beneath each trial), `exclude` (partial
points to leave out), `seeds` (the number of seeds of synthesis and distillation), `stop` (early stopping), `tiny`
(overrides for a small run) and `about`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from dfkd_ray import trial as one_trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig, nested_models, validate
from dfkd_ray.config.fields import AUTO, first_of
from dfkd_ray.storage import public_name
from dfkd_ray.sweep.combinations import MOST_DRAWS, data_at, expanded, matching
from dfkd_ray.sweep.combinations import expand as expand
from dfkd_ray.sweep.optuna import Suggestions
from dfkd_ray.sweep.search import Point, StopConfig, probes, random_points
from dfkd_ray.sweep.sweep_config import About as About
from dfkd_ray.sweep.sweep_config import SweepConfig as SweepConfig
from dfkd_ray.sweep.sweep_config import parse as parse


@dataclass(frozen=True)
class Job:
    """One trial of a sweep: its config, its loaded teacher and its id."""

    config: TrialConfig
    teacher: Teacher
    id: str


@dataclass(frozen=True)
class Plan:
    """A sweep that is ready to run: its jobs, or an Optuna search that chooses them; and the rule of early stopping."""

    jobs: list[Job]
    search: Suggestions | None = None
    stop: StopConfig | None = None
    max_concurrent: int | None = None
    settings: SweepConfig | None = None  # the sweep file; None if the jobs were given directly

    @property
    def num_trials(self) -> int:
        """The largest number of trials that may run."""
        return self.search.config.num_trials if self.search else len(self.jobs)

    @property
    def known_jobs(self) -> list[Job]:
        """All jobs, or those at the ends of an Optuna search's space."""
        return list(self.search.probes) if self.search else self.jobs

    def jobs_in(self, rows: Iterable[Mapping[str, Any]]) -> list[Job]:
        """All jobs of a grid or random search; of an Optuna search, those that have a row in the `trials` table."""
        return self.search.jobs_in(rows) if self.search else self.jobs

    def likely_jobs(self, num_done: int) -> list[Job]:
        """All jobs; for an Optuna search with `num_done` trials done, as many random jobs as it still runs."""
        if self.search is None:
            return self.jobs
        drawn = map(self.search.job_at, itertools.islice(random_points(self.search.config), MOST_DRAWS))
        some = [job for job in drawn if job is not None]
        return list(itertools.islice(itertools.cycle(some), max(0, self.num_trials - num_done))) if some else []


def job_of(config: TrialConfig, teacher: Teacher) -> Job:
    """The job of a trial. `ValueError` if the teacher lacks an activation record that the config needs."""
    config = one_trial.pinned(config, teacher)
    return Job(config, teacher, one_trial.trial_id(config, teacher))


def plan(
    configs: Sequence[TrialConfig], open_teacher: Callable[[str], Teacher], trust_code: Sequence[str] = ()
) -> list[Job]:
    """Load each teacher once, and check each trial and compute its id. `ValueError` with all errors."""
    teachers, unopened = opened([config.teacher for config in configs], open_teacher)
    jobs, unfit = checked(configs, teachers, trust_code)
    refuse([*unopened, *unfit])
    return jobs


def refuse(errors: Sequence[str]) -> None:
    """`ValueError` with the first of these errors and the number of the others; nothing if there are none."""
    if errors:
        raise ValueError("\n".join(first_of(errors, len(errors))))


def opened(names: Sequence[str], open_teacher: Callable[[str], Teacher]) -> tuple[dict[str, Teacher], list[str]]:
    """Name → loaded teacher, and the errors of those that cannot be loaded."""
    teachers: dict[str, Teacher] = {}
    errors: dict[str, None] = {}
    for name in dict.fromkeys(names):
        try:
            teachers[name] = open_teacher(name)
        except ValueError as error:
            errors[str(error)] = None
    return teachers, list(errors)


def checked(
    configs: Sequence[TrialConfig], teachers: Mapping[str, Teacher], trust_code: Sequence[str], on_gpu: bool = False
) -> tuple[list[Job], list[str]]:
    """A job for each distinct trial whose teacher is loaded, and the errors of trials that cannot run."""
    jobs: dict[str, Job] = {}
    errors: dict[str, None] = {}
    good: set[str] = set()
    for config in configs:
        if config.teacher not in teachers:
            continue
        try:
            job = job_of(config, teachers[config.teacher])
            jobs.setdefault(job.id, job)
            kind = kind_of(config)
            if kind not in good:
                one_trial.check(config, job.teacher, trust_code, on_gpu)
                good.add(kind)
        except ValueError as error:
            errors[f"{public_name(config.teacher)}: {error}"] = None
    return list(jobs.values()), list(errors)


def kind_of(config: TrialConfig) -> str:
    """All fields that decide whether a trial fits its teacher, as text: all but seeds and floats, and if it prunes.

    Trials of one kind are checked once. Checking a new student takes milliseconds; a sweep may have 100,000 trials.
    """
    return f"{config.pruning.sparsity > 0} {config.model_dump_json(exclude=without_numbers(TrialConfig))}"


@lru_cache
def without_numbers(model: type[BaseModel]) -> Any:
    """The seeds and floats of a config, in the form of pydantic's `exclude`."""
    inner = {name: nested_models(field.annotation) for name, field in model.model_fields.items()}
    below = {n: {k: v for m in models for k, v in without_numbers(m).items()} for n, models in inner.items() if models}
    return below | {n: True for n, field in model.model_fields.items() if n == "seed" or field.annotation is float}


def prepare(
    sweep: SweepConfig,
    open_teacher: Callable[[str], Teacher],
    overrides: Mapping[str, Any] | None = None,
    *,
    tiny: bool = False,
    trust_code: Sequence[str] = (),
    on_gpu: bool = False,
) -> Plan:
    """Check everything that can be checked before a sweep starts; returns the plan.

    Validated are all combinations of a grid, all points of a random search, or the ends and choices of an Optuna
    search. All teachers are loaded. `on_gpu`: check for other machines, with GPUs, even if this one has none.
    `ValueError` with all errors.
    """
    overrides = overrides or {}
    configs, names, errors = expanded(sweep, overrides, tiny)
    teachers, unopened = opened(names, open_teacher)
    search, asked = None, configs
    if sweep.search is not None and sweep.search.algorithm == "optuna" and not errors:
        found = (config_at(sweep, point, overrides, tiny) for point in probes(sweep.search))
        asked = [config for config in found if config is not None]
        tried = [job for job in (job_or_none(config, teachers) for config in asked) if job is not None]
        configs = [job.config for job in tried]
        if any(config.synthesis.method == "real" for config in configs):
            errors.append("search.algorithm=optuna: synthesis.method=real is an upper bound, run it as a grid")

        def job_at(point: Point) -> Job | None:
            config = config_at(sweep, point, overrides, tiny)
            return None if config is None else job_or_none(config, teachers)

        try:
            search = Suggestions(sweep.search, job_at, tried)
        except ValueError as error:
            errors.append(str(error))
    if on_gpu and any(AUTO in (one.synthesis.batch_size, one.reference.synthesis.batch_size) for one in asked):
        errors.append("batch_size=auto goes by this machine's memory, and the trials run on others: give a number")
        configs = []
    jobs, unfit = checked(configs, teachers, trust_code, on_gpu)
    refuse([*errors, *unopened, *unfit])
    most = sweep.search.max_concurrent if sweep.search else None
    return Plan([] if search else jobs, search, sweep.stop, most, sweep)


def config_at(sweep: SweepConfig, point: Point, overrides: Mapping[str, Any], tiny: bool) -> TrialConfig | None:
    """The trial config at a point; None if it is excluded or invalid."""
    try:
        if matching(sweep, data_at(sweep, point, overrides)):
            return None
        return validate(TrialConfig, data_at(sweep, point, overrides, tiny), "sweep")
    except ValueError:
        return None


def job_or_none(config: TrialConfig, teachers: Mapping[str, Teacher]) -> Job | None:
    """The job of a trial; None if its fields do not fit its teacher, or if that is not loaded."""
    try:
        return job_of(config, teachers[config.teacher]) if config.teacher in teachers else None
    except ValueError:
        return None
