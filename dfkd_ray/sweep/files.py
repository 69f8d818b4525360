"""A sweep file → validated trial configs → jobs with their teachers open. Nothing starts here.

A sweep is `base` (a trial config) and `grid` (dotted field → list of values; a list of such grids is their union) or
`search` (dotted field → domain), with `exclude` (partial points that are left out), `seeds` (a number: that many seeds
of synthesis and distillation), `stop` (early stopping), `tiny` (a small override) and `about`.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from dfkd_ray import trial as one_trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import (
    STRICT,
    SYNTHESIS_CONFIGS,
    DeepInversionConfig,
    ReferenceConfig,
    TrialConfig,
    field_paths,
    flat,
    validate,
    with_overrides,
)
from dfkd_ray.storage import public_name, without_secrets
from dfkd_ray.sweep.search import Point, SearchConfig, StopConfig, can_match, options, probes, random_points, shown
from dfkd_ray.sweep.tuning import Suggestions

SEED_FIELDS = ("synthesis.seed", "distillation.seed")
MOST_DRAWS = 100  # per trial of a random search, before its space counts as used up


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

    about: About | None = Field(default=None, description="for readers; shipped sweeps have it")
    base: dict[str, Any] = Field(default_factory=dict, description="a trial config; what it leaves out has defaults")
    grid: dict[str, list[Any]] | list[dict[str, list[Any]]] | None = Field(
        default=None, description="dotted field → values; or several"
    )
    search: SearchConfig | None = Field(default=None, description="in place of grid: points drawn from domains")
    exclude: list[dict[str, Any]] = Field(
        default_factory=list, description="dotted field → value or list of values; what matches all of one is left out"
    )
    seeds: int = Field(
        default=1, ge=1, description="seeds 0 … n - 1 of synthesis and distillation for every combination"
    )
    stop: StopConfig | None = Field(default=None, description="early stopping; null: every trial runs to its end")
    tiny: dict[str, Any] = Field(default_factory=dict, description="dotted field → value, for --tiny")

    @field_validator("exclude")
    @classmethod
    def _known_fields(cls, exclude: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = list(field_paths(TrialConfig))
        for name in dict.fromkeys(name for entry in exclude for name in entry if name not in known):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            raise ValueError(f"{name}: unknown field" + (f"; did you mean {close[0]}?" if close else ""))
        return exclude

    @model_validator(mode="after")
    def _grid_or_search(self) -> "SweepConfig":
        if (self.grid is None) == (self.search is None):
            raise ValueError("expected either grid or search, and one of them")
        if self.search is not None and self.seeds != 1:
            raise ValueError(
                f"seeds={self.seeds} goes with grid; a search tries every point with one seed: leave seeds out, and "
                "run the best points as a grid with several"
            )
        return self


def parse(data: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """The contents of a sweep file out of plain data; `ValueError` with all errors at once, after `where`."""
    return validate(SweepConfig, data, where)


@dataclass(frozen=True)
class Job:
    """One trial of a sweep, with what it needs."""

    config: TrialConfig
    teacher: Teacher
    id: str


@dataclass(frozen=True)
class Plan:
    """A sweep that can run: the trials known beforehand, or Optuna's; and when trials are stopped early."""

    jobs: list[Job]
    search: Suggestions | None = None
    stop: StopConfig | None = None
    max_concurrent: int | None = None

    @property
    def num_trials(self) -> int:
        """How many trials there will be, at most."""
        return self.search.config.num_trials if self.search else len(self.jobs)

    @property
    def known_jobs(self) -> list[Job]:
        """The jobs known beforehand, or those at the ends of an Optuna search's space."""
        return list(self.search.probes) if self.search else self.jobs

    def jobs_in(self, rows: Iterable[Mapping[str, Any]]) -> list[Job]:
        """This sweep's trials among the rows of a `trials` table; those without a row too, where known beforehand."""
        return self.search.jobs_in(rows) if self.search else self.jobs

    def likely_jobs(self, num_done: int) -> list[Job]:
        """All jobs, or as many random ones as an Optuna search with `num_done` trials will still run."""
        if self.search is None:
            return self.jobs
        drawn = map(self.search.job_at, itertools.islice(random_points(self.search.config), MOST_DRAWS))
        some = [job for job in drawn if job is not None]
        return list(itertools.islice(itertools.cycle(some), max(0, self.num_trials - num_done))) if some else []


def job_of(config: TrialConfig, teacher: Teacher) -> Job:
    """The job of a trial. `ValueError` where its teacher lacks an activation record that it asks for."""
    config = one_trial.pinned(config, teacher)
    return Job(config, teacher, one_trial.trial_id(config, teacher))


def expand(sweep: SweepConfig, overrides: Mapping[str, Any], *, tiny: bool = False) -> list[TrialConfig]:
    """Every trial config known beforehand, in order, each once: none of an Optuna search, though its space is checked.

    `overrides` (dotted) win over `base`; an override of a field that varies is an error. `tiny` wins over grid and
    seeds too: an axis that it fixes has one value, and points that thereby become equal are one trial. `ValueError`
    with all errors of all combinations, or of all ends and choices of the domains, at once.
    """
    configs, _, errors = expanded(sweep, overrides, tiny)
    if errors:
        raise ValueError("\n".join(errors))
    return configs


def expanded(
    sweep: SweepConfig, overrides: Mapping[str, Any], tiny: bool
) -> tuple[list[TrialConfig], list[str], list[str]]:
    """Trial configs, the names of all teachers (also those of combinations that are wrong), and all errors."""
    varied = dict.fromkeys((name for grid in grids(sweep) for name in grid), "grid")
    varied |= dict.fromkeys(sweep.search.space if sweep.search else (), "search")
    varied |= dict.fromkeys(SEED_FIELDS if sweep.seeds > 1 else (), "seeds")
    errors = {
        f"--set {name}: the sweep's {varied[name]} varies this field; change the {varied[name]} instead": None
        for name in sorted(set(varied) & set(overrides))
    }
    if errors:
        return [], [], list(errors)
    configs: dict[str, TrialConfig] = {}
    teachers: dict[str, None] = {}
    unmatched = set(range(len(sweep.exclude)))

    def take(point: Point) -> TrialConfig | None:
        """The config at a point; None where it is excluded or wrong, which is written down."""
        try:
            data = data_at(sweep, point, overrides)
            matched = matching(sweep, data)
            unmatched.difference_update(matched)
            if matched:
                return None
            data = data_at(sweep, point, overrides, tiny)
            if isinstance(data.get("teacher"), str):
                teachers[data["teacher"]] = None
            return validate(TrialConfig, data, "sweep")
        except ValueError as error:
            errors.update(dict.fromkeys(str(error).splitlines()))
            return None

    if sweep.search is None:
        for point in grid_points(sweep):
            config = take(point)
            if config is not None:
                configs.setdefault(config.model_dump_json(), config)
    else:
        fixed = flat(filled(sweep.base))
        unmatched = {i for i in unmatched if not can_match(sweep.exclude[i], sweep.search, fixed)}
        tried = [config for config in map(take, probes(sweep.search)) if config is not None]
        if sweep.search.algorithm == "random" and not errors:
            draws = itertools.islice(random_points(sweep.search), MOST_DRAWS * sweep.search.num_trials)
            for config in map(take, draws):
                if config is not None:
                    configs.setdefault(config.model_dump_json(), config)
                if errors or len(configs) == sweep.search.num_trials:
                    break
            if not errors and len(configs) < sweep.search.num_trials:
                number = f"search.num_trials={sweep.search.num_trials}"
                errors[f"{number}: the space has no more than {len(configs)} distinct points; lower it"] = None
        errors.update(dict.fromkeys(stop_errors(sweep.stop, tried)))
    if not overrides:  # what was set by hand may leave an entry without a match
        for index in sorted(unmatched):
            errors[f"exclude: {without_secrets(shown(sweep.exclude[index]))} matches no combination"] = None
    if sweep.search is None:
        errors.update(dict.fromkeys(stop_errors(sweep.stop, list(configs.values()))))
        if not configs and not errors:
            errors["exclude leaves no combination to run"] = None
    return list(configs.values()), list(teachers), list(errors)


def grids(sweep: SweepConfig) -> list[dict[str, list[Any]]]:
    """The grids of a sweep: one, several, or none."""
    return sweep.grid if isinstance(sweep.grid, list) else [] if sweep.grid is None else [sweep.grid]


def grid_points(sweep: SweepConfig) -> Iterator[Point]:
    """Every combination of every grid with every seed."""
    for grid in grids(sweep):
        axes = [[(name, value) for value in values] for name, values in grid.items()]
        for combination in itertools.product(*axes):
            for seed in range(sweep.seeds):
                yield dict(combination) | (dict.fromkeys(SEED_FIELDS, seed) if sweep.seeds > 1 else {})


def data_at(sweep: SweepConfig, point: Point, overrides: Mapping[str, Any], tiny: bool = False) -> dict[str, Any]:
    """The plain data of the trial at a point: base, then the point, then `tiny` and overrides where they apply."""
    data = with_overrides(sweep.base, point)
    fixed = {**(sweep.tiny if tiny else {}), **overrides}
    return with_overrides(data, {k: v for k, v in fixed.items() if applies(k, data)})


def applies(name: str, data: Mapping[str, Any]) -> bool:
    """Whether an override is meant for this combination: another synthesis method's fields are not."""
    parent, _, leaf = name.rpartition(".")
    if parent not in ("synthesis", "reference.synthesis"):
        return True
    given: Any = data
    for part in parent.split("."):
        given = dict(given.get(part) or {})
    own = SYNTHESIS_CONFIGS[given.get("method", "deepinversion")].model_fields
    return leaf in own or not any(leaf in other.model_fields for other in SYNTHESIS_CONFIGS.values())


def matching(sweep: SweepConfig, data: Mapping[str, Any]) -> list[int]:
    """Which entries of `exclude` match a trial's plain data in all of their fields."""
    if not sweep.exclude:
        return []
    values = filled(data)

    def value(name: str) -> Any:
        node: Any = values
        for part in name.split("."):
            node = node.get(part) if isinstance(node, Mapping) and part in node else None
        return node

    return [
        index
        for index, entry in enumerate(sweep.exclude)
        if all(value(name) in options(wanted) for name, wanted in entry.items())
    ]


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's plain data over the defaults of all fields, unvalidated: what is excluded may be wrong otherwise."""

    def defaults_of(section: Any) -> Any:
        given = section.get("synthesis") if isinstance(section, Mapping) else None
        method = given.get("method") if isinstance(given, Mapping) else None
        return SYNTHESIS_CONFIGS.get(str(method), DeepInversionConfig)()

    reference = ReferenceConfig.model_construct(synthesis=defaults_of(data.get("reference")))
    defaults = TrialConfig.model_construct(synthesis=defaults_of(data), reference=reference).model_dump(mode="json")

    def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
        both = {k: v for k, v in above.items() if isinstance(v, Mapping) and isinstance(below.get(k), Mapping)}
        return {**below, **above, **{name: over(below[name], value) for name, value in both.items()}}

    return over(defaults, data)


def stop_errors(stop: StopConfig | None, configs: Sequence[TrialConfig]) -> list[str]:
    """Why early stopping could not compare these trials, or not act."""
    if stop is None:
        return []
    errors = []
    for name in ("teacher", "reference", "distillation.eval_every"):
        section, _, leaf = name.partition(".")
        parts = [getattr(config, section) for config in configs]
        if len({str(getattr(part, leaf) if leaf else part) for part in parts}) > 1:
            errors.append(f"stop compares trials by their looks at one reference set: {name} has to be the same in all")
    for grace, steps in dict.fromkeys(
        (stop.asha.grace_looks * config.distillation.eval_every, config.distillation.num_steps) for config in configs
    ):
        if grace >= steps:
            errors.append(
                f"stop.asha.grace_looks={stop.asha.grace_looks}: the first look that may stop a trial is at step "
                f"{grace} of {steps}, so none is stopped early; lower distillation.eval_every or grace_looks"
            )
    return errors


def plan(
    configs: Sequence[TrialConfig], open_teacher: Callable[[str], Teacher], trust_code: Sequence[str] = ()
) -> list[Job]:
    """Open every teacher once, name and check every trial. `ValueError` with all that cannot run."""
    teachers, errors = opened([config.teacher for config in configs], open_teacher)
    jobs, more = checked(configs, teachers, trust_code)
    if errors or more:
        raise ValueError("\n".join([*errors, *more]))
    return jobs


def opened(names: Sequence[str], open_teacher: Callable[[str], Teacher]) -> tuple[dict[str, Teacher], list[str]]:
    """Teachers by name, and why some cannot be opened."""
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
    """A job for every distinct trial whose teacher is open, and why some cannot run."""
    jobs: dict[str, Job] = {}
    errors: dict[str, None] = {}
    for config in configs:
        if config.teacher not in teachers:
            continue
        try:
            job = job_of(config, teachers[config.teacher])
            jobs.setdefault(job.id, job)
            one_trial.check(config, job.teacher, trust_code, on_gpu)
        except ValueError as error:
            errors[f"{public_name(config.teacher)}: {error}"] = None
    return list(jobs.values()), list(errors)


def prepare(
    sweep: SweepConfig,
    open_teacher: Callable[[str], Teacher],
    overrides: Mapping[str, Any] | None = None,
    *,
    tiny: bool = False,
    trust_code: Sequence[str] = (),
    on_gpu: bool = False,
) -> Plan:
    """Everything that can be checked before a sweep starts, and the sweep ready to run.

    Every combination of a grid, every point of a random search, or the ends and choices of an Optuna search is
    validated, every teacher opened. `on_gpu`: for machines with GPUs, though this one may have none. `ValueError` with
    all errors at once.
    """
    overrides = overrides or {}
    configs, names, errors = expanded(sweep, overrides, tiny)
    teachers, unopened = opened(names, open_teacher)
    search = None
    if sweep.search is not None and sweep.search.algorithm == "optuna" and not errors:
        tried = [job for job in (at(sweep, p, overrides, tiny, teachers) for p in probes(sweep.search)) if job]
        configs = [job.config for job in tried]
        if any(config.synthesis.method == "real" for config in configs):
            errors.append("search.algorithm=optuna: synthesis.method=real is an upper bound, run it as a grid")
        try:
            search = Suggestions(sweep.search, lambda point: at(sweep, point, overrides, tiny, teachers), tried)
        except ValueError as error:
            errors.append(str(error))
    jobs, unfit = checked(configs, teachers, trust_code, on_gpu)
    if errors or unopened or unfit:
        raise ValueError("\n".join([*errors, *unopened, *unfit]))
    return Plan([] if search else jobs, search, sweep.stop, sweep.search.max_concurrent if sweep.search else None)


def at(
    sweep: SweepConfig, point: Point, overrides: Mapping[str, Any], tiny: bool, teachers: Mapping[str, Teacher]
) -> Job | None:
    """The job at a point; None where it is excluded, its fields do not go together, or its teacher is not open."""
    if matching(sweep, data_at(sweep, point, overrides)):
        return None
    try:
        config = validate(TrialConfig, data_at(sweep, point, overrides, tiny), "sweep")
        return job_of(config, teachers[config.teacher]) if config.teacher in teachers else None
    except ValueError:
        return None
