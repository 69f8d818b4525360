"""Expands a sweep file (grid or random search) into trial configs, applies `exclude`, and collects all errors.

Each error of a field is reported once, with the number of trials that have it: a sweep may have 100,000 trials.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from dfkd_ray.config import (
    METHODS,
    DeepInversionConfig,
    PruningConfig,
    ReferenceConfig,
    TrialConfig,
    flat,
    with_effort,
    with_overrides,
)
from dfkd_ray.config.fields import describe
from dfkd_ray.plain import given, named, value_at
from dfkd_ray.storage import without_secrets
from dfkd_ray.sweep import expectations
from dfkd_ray.sweep.search import (
    MOST_TRIALS,
    Point,
    StopConfig,
    can_match,
    is_one_of,
    options,
    probes,
    random_points,
    shown,
)
from dfkd_ray.sweep.sweep_config import SEED_FIELDS, SweepConfig, parts_of

SECTIONS = ("pruning", "student", "synthesis", "distillation", "reference", "reference.synthesis")
MOST_DRAWS = 100  # per trial of a random search, before its space counts as exhausted
MOST_DRAWS_IN_ALL = 1_000_000
MOST_FAULTS = 200_000  # after which no more trials are checked


@dataclass
class Faults:
    """Errors of many trials: for each field and kind of error the first message, and how many trials and values."""

    num_trials: int = 0  # checked
    num_faults: int = 0
    lines: dict[Any, str] = field(default_factory=dict)
    counts: dict[Any, int] = field(default_factory=dict)
    values: dict[Any, set[str]] = field(default_factory=dict)

    def add(self, error: ValueError | ValidationError) -> None:
        """Add the error of one trial."""
        if isinstance(error, ValidationError):
            for item in error.errors(include_url=False):
                key = (item["loc"], item["type"], item["msg"] if item["type"] == "value_error" else None)
                if key not in self.lines:
                    self.lines[key] = describe(TrialConfig, item, "sweep")
                self.count(key, given(item.get("input")))
        else:
            self.lines.setdefault(str(error), str(error))
            self.count(str(error), "")

    def count(self, key: Any, value: str) -> None:
        """One more trial has this error."""
        self.num_faults += 1
        self.counts[key] = self.counts.get(key, 0) + 1
        self.values.setdefault(key, set()).add(value)

    def report(self, num_points: int | None) -> list[str]:
        """One line per error. `num_points`: the number of trials of a grid; None for the points of a search."""
        what = f"{self.num_trials:,} points tried" if num_points is None else f"{self.num_trials:,} trials"
        lines = []
        for key, line in self.lines.items():
            num_others = len(self.values[key]) - 1
            others = f" and {num_others:,} value{'s' if num_others > 1 else ''} more" if num_others else ""
            share = f" (in {self.counts[key]:,} of {what})" if self.num_trials > 1 else ""
            lines.append(line + others + share)
        if num_points is not None and self.num_trials < num_points:
            lines.append(f"sweep: {num_points - self.num_trials:,} trials were not looked at any more")
        return lines


def expand(sweep: SweepConfig, overrides: Mapping[str, Any], *, tiny: bool = False) -> list[TrialConfig]:
    """All trial configs of a grid or a random search, in order and without duplicates; empty for an Optuna search.

    The space of an Optuna search is checked all the same. `overrides` (dotted names) replace values of `base`; to
    override a varied field is an error. `tiny` replaces values of grid and seeds too: an axis that it fixes has one
    value, and points that become equal are one trial. `ValueError` with all errors of all combinations of a grid, or of
    the ends and choices of all domains.
    """
    configs, _, errors = expanded(sweep, overrides, tiny)
    if errors:
        raise ValueError("\n".join(errors))
    return configs


def expanded(
    sweep: SweepConfig, overrides: Mapping[str, Any], tiny: bool
) -> tuple[list[TrialConfig], list[str], list[str]]:
    """Trial configs, the names of all teachers (including those of invalid combinations), and all errors."""
    if errors := override_errors(sweep, overrides):
        return [], [], errors
    configs: dict[bytes, TrialConfig] = {}
    teachers: dict[str, None] = {}
    unmatched = set(range(len(sweep.exclude)))
    unused = set(overrides)
    faults = Faults()

    def take(point: Point) -> TrialConfig | None:
        """The config at a point; None if the point is excluded or invalid. Errors go into `faults`."""
        faults.num_trials += 1
        try:
            data = data_at(sweep, point, overrides)
            matched = matching(sweep, data)
            unmatched.difference_update(matched)
            if unused:
                below = with_overrides(sweep.base, point)
                unused.difference_update([name for name in unused if applies(name, below, overrides)])
            if matched:
                return None
            if tiny:
                data = data_at(sweep, point, overrides, tiny)
            if isinstance(data.get("teacher"), str):
                teachers[data["teacher"]] = None
            return TrialConfig.model_validate(data)
        except ValueError as error:  # pydantic's too
            faults.add(error)
            return None

    def keep(config: TrialConfig) -> None:
        configs.setdefault(hashlib.sha256(config.model_dump_json().encode()).digest(), config)

    if sweep.search is None:
        for point in grid_points(sweep):
            config = take(point)
            if config is not None:
                keep(config)
            if faults.num_faults > MOST_FAULTS:
                break
        errors = faults.report(sweep.num_points)
    else:
        fixed = flat(filled(sweep.base))
        unmatched = {i for i in unmatched if not can_match(sweep.exclude[i], sweep.search, fixed)}
        tried = [config for config in map(take, probes(sweep.search)) if config is not None]
        if sweep.search.algorithm == "random" and not faults.lines:
            wanted = sweep.search.num_trials
            for point in distinct_points(sweep):
                config = take(point)
                if config is not None:
                    keep(config)
                if faults.lines or len(configs) == wanted:
                    break
            if not faults.lines and len(configs) < wanted:
                number = f"search.num_trials={wanted}"
                errors.append(f"{number}: the space has no more than {len(configs)} distinct points; lower it")
        errors = faults.report(None) + errors + stop_errors(sweep.stop, tried)
    complete = faults.num_faults <= MOST_FAULTS
    if not overrides and complete:  # an override may leave an entry without a match
        for index in sorted(unmatched):
            errors.append(f"exclude: {without_secrets(shown(sweep.exclude[index]))} matches no combination")
    if not faults.lines:
        errors += [f"`set` {named(name)}: no trial's synthesis has such a field; leave it out" for name in unused]
    if sweep.search is None:
        errors += stop_errors(sweep.stop, list(configs.values()))
        if not configs and not errors:
            errors.append("exclude leaves no combination to run")
        expected = sweep.about.expected if sweep.about else ""
        if isinstance(expected, list) and not (errors or overrides or tiny):  # the ranges hold for the file as it is
            errors += expectations.faults(expected, list(configs.values()))
    return list(configs.values()), list(teachers), list(dict.fromkeys(errors))


def override_errors(sweep: SweepConfig, overrides: Mapping[str, Any]) -> list[str]:
    """Errors for overrides of a field that the sweep varies, of a part of it, or of a section that contains it."""
    varied: dict[str, str] = {}
    for grid in sweep.grids:
        for name, values in grid.items():
            varied |= dict.fromkeys((name, *(f"{name}.{part}" for part in parts_of(values))), "grid")
    for name, domain in (sweep.search.domains if sweep.search else {}).items():
        varied |= dict.fromkeys((name, *(f"{name}.{part}" for part in parts_of(domain.values))), "search")
    varied |= dict.fromkeys(SEED_FIELDS if sweep.seeds > 1 else (), "seeds")
    return [
        f"`set` {named(name)}: the sweep's {varied[hit]} varies this field; change the {varied[hit]} instead"
        for name in sorted(overrides)
        if (hit := next((other for other in varied if other == name or other.startswith(name + ".")), None))
    ]


def grid_points(sweep: SweepConfig) -> Iterator[Point]:
    """Every combination of every grid with every seed."""
    for grid in sweep.grids:
        axes = [[(name, value) for value in values] for name, values in grid.items()]
        for combination in itertools.product(*axes):
            for seed in range(sweep.seeds):
                yield dict(combination) | (dict.fromkeys(SEED_FIELDS, seed) if sweep.seeds > 1 else {})


def distinct_points(sweep: SweepConfig) -> Iterator[Point]:
    """The random points of a search without duplicates, until `most` points are drawn or the space is exhausted."""
    assert sweep.search is not None
    most = min(MOST_DRAWS * sweep.search.num_trials, max(MOST_DRAWS_IN_ALL, 2 * MOST_TRIALS))
    sizes = [domain.num_values for domain in sweep.search.domains.values()]
    num_points = 1
    for size in sizes:
        num_points = num_points * size if size is not None and num_points <= MOST_TRIALS else MOST_TRIALS + 1
    seen: set[str] = set()
    for point in itertools.islice(random_points(sweep.search), most):
        key = repr(point)
        if key not in seen:
            seen.add(key)
            yield point
        if len(seen) >= num_points and num_points <= MOST_TRIALS:
            return


def data_at(sweep: SweepConfig, point: Point, overrides: Mapping[str, Any], tiny: bool = False) -> dict[str, Any]:
    """The plain data of the trial at a point: base, updated by the point, then by `tiny` and overrides if they apply.

    The fields of the sweep's effort are beneath base and point.

    pydantic's `ValueError` if a section that these fields belong to is not a mapping.
    """
    data = with_effort(with_overrides(sweep.base, point), sweep.effort)
    fixed = {**(sweep.tiny if tiny else {}), **overrides}
    if not fixed:
        return data
    if any(not isinstance(value_at(data, name) or {}, Mapping) for name in SECTIONS if name not in fixed):
        TrialConfig.model_validate({"teacher": "any", **data})  # raises the error
    return with_overrides(data, {k: v for k, v in fixed.items() if applies(k, data, fixed)})


def applies(name: str, data: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Whether the override `name` of `fixed` applies to this trial: a field of another synthesis method does not."""
    parent, _, leaf = name.rpartition(".")
    if parent not in ("synthesis", "reference.synthesis"):
        return True
    section = value_at(data, parent)
    method = section.get("method", "deepinversion") if isinstance(section, Mapping) else "deepinversion"
    method = fixed.get(f"{parent}.method", method)
    own = METHODS.get(method) if isinstance(method, str) else None
    if own is None:  # validation refuses it later
        return True
    return leaf in own.config.model_fields or not any(leaf in row.config.model_fields for row in METHODS.values())


def matching(sweep: SweepConfig, data: Mapping[str, Any]) -> list[int]:
    """The indices of the `exclude` entries whose fields all match a trial's plain data."""
    if not sweep.exclude:
        return []
    over = filled(data)
    values = {name: value_at(over, name) for entry in sweep.exclude for name in entry}
    return [
        index
        for index, entry in enumerate(sweep.exclude)
        if all(is_one_of(values[name], options(wanted)) for name, wanted in entry.items())
    ]


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's plain data merged over all defaults, unvalidated: an excluded point may be invalid in other fields."""
    methods = [str(value_at(data, f"{section}method")) for section in ("synthesis.", "reference.synthesis.")]

    def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
        both = {k: v for k, v in above.items() if isinstance(v, Mapping) and isinstance(below.get(k), Mapping)}
        return {**below, **above, **{name: over(below[name], value) for name, value in both.items()}}

    return over(defaults(*methods), data)


@lru_cache
def defaults_of(method: str, reference_method: str) -> dict[str, Any]:
    """The defaults of all fields of a trial with these synthesis methods. Cached: do not modify the result."""
    reference = ReferenceConfig.model_construct(synthesis=METHODS[reference_method].config())
    config = TrialConfig.model_construct(synthesis=METHODS[method].config(), reference=reference)
    # Of pruning also the fields that a dump leaves out because they do not act.
    return config.model_dump(mode="json") | {"pruning": dict(PruningConfig())}


def defaults(*methods: str) -> dict[str, Any]:
    """Like `defaults_of`; an unknown method counts as the default method."""
    return defaults_of(*(name if name in METHODS else DeepInversionConfig().method for name in methods))


def stop_errors(stop: StopConfig | None, configs: Sequence[TrialConfig]) -> list[str]:
    """Errors if early stopping cannot compare these trials, or could never stop one."""
    if stop is None:
        return []
    errors = []
    compared = {
        "teacher": [config.teacher for config in configs],
        "reference": [config.reference for config in configs],
        "distillation.eval_every": [config.distillation.eval_every for config in configs],
    }
    for name, values in compared.items():
        if any(value != values[0] for value in values):
            errors.append(f"stop compares trials by their looks at one reference set: {name} has to be the same in all")
    own = [config.distillation for config in configs if config.distillation.num_passes is None]
    for grace, steps in dict.fromkeys((stop.asha.grace_looks * kd.eval_every, kd.num_steps) for kd in own):
        if grace >= steps:
            errors.append(
                f"stop.asha.grace_looks={stop.asha.grace_looks}: the first look that may stop a trial is at step "
                f"{grace} of {steps}, so none is stopped early; lower distillation.eval_every or grace_looks"
            )
    return errors
