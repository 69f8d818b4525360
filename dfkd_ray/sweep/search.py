"""Sections `search` and `stop` of a sweep file: pydantic models, domains with Ray Tune's names, random points. Pure.

Pure: no Ray, no Optuna. Point `i` of a random search is a function of (space, seed, i), so its trials are known before
the sweep starts, as those of a grid. Optuna's points depend on earlier trials (`dfkd_ray.sweep.optuna`).
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from dfkd_ray.batches import mix_seed
from dfkd_ray.config import STRICT
from dfkd_ray.config.fields import LARGEST_FLOAT, NUMBER, Count, Seed, plain
from dfkd_ray.config.parsing import name_fault
from dfkd_ray.plain import SHOWN_PATH, alike, cut, fault, given, named
from dfkd_ray.text import number_in

Point = dict[str, Any]  # dotted field → value
BOUNDED = {"uniform": 2, "loguniform": 2, "quniform": 3, "qloguniform": 3}
BOUNDED |= {"randint": 2, "lograndint": 2, "qrandint": 3, "qlograndint": 3}
LARGEST_WHOLE = 2**53  # up to which floats hold every integer
MOST_SHOWN = 100  # a value with more elements is described instead of printed
MOST_TRIALS = 100_000  # of a sweep
# Not searchable: trials are compared on one teacher and reference set, and a search over seeds would select luck.
FIXED = ("teacher", "reference", "device", "synthesis.seed", "distillation.seed")

# What a search can look for or keep within bounds, and its direction. Nothing of it is measured on test data.
Objective = Literal["reference_kl", "latency_ratio", "num_macs", "num_parameters"]
LARGER_IS_BETTER = ("latency_ratio",)
IN_TEACHERS_SHAPE = {"latency_ratio": 1.0}  # what a null stands for: not measured, for it is the teacher's


@dataclass(frozen=True)
class Domain:
    """The values of one field: a `choice` of `values`, or numbers from `low` to `high` in multiples of `step`.

    `high` is included, except in continuous domains. `step` is None for continuous domains.
    """

    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        return "int" in self.kind

    @property
    def num_values(self) -> int | None:
        """The largest number of distinct values; None for a continuous domain."""
        if self.kind == "choice":
            return len({repr(value) for value in self.values})
        return None if self.step is None else math.floor((self.high - self.low) / self.step + 1e-6) + 1

    @property
    def is_log(self) -> bool:
        """Whether the distribution is uniform in the logarithm."""
        return "log" in self.kind

    def ends(self) -> tuple[Any, ...]:
        """All choices, or the smallest and the largest number."""
        return self.values if self.kind == "choice" else (self.number(self.low), self.number(self.high))

    def number(self, value: float) -> float | int:
        """A number as this domain's type; rounding removes the float error of multiplying by the step."""
        return round(value) if self.is_integer else round(value, 12) if self.step else float(value)

    def at(self, share: float) -> Any:
        """The quantile `share` in [0, 1) of the domain."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        step = self.step or 0.0
        if self.is_log:
            value = self.low * ((self.high + step) / self.low) ** share
        else:
            value = self.low + share * (self.high + step - self.low)
        if step:
            # The low end is a multiple of the step; the tolerance is for a quotient just below an integer.
            value = self.low + step * math.floor((value - self.low) / step + 1e-9)
        return self.number(min(value, self.high))

    def holds(self, value: Any) -> bool:
        """Whether `value` is a choice, or a number within the bounds; the step is not checked."""
        if self.kind == "choice":
            return any(alike(value, one) for one in self.values)
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


def domain(written: Any) -> Domain:
    """Parse a domain of a sweep file: a list, or `{name: arguments}`. `ValueError` if it is neither or invalid."""
    if isinstance(written, list):
        written = {"choice": written}
    if not isinstance(written, Mapping) or len(written) != 1 or next(iter(written)) not in ("choice", *BOUNDED):
        names = ", ".join(("choice", *BOUNDED))
        raise ValueError(f"expected a list of values or one of {names} with its arguments, got {shown(written)}")
    kind, arguments = next(iter(written.items()))
    if kind == "choice":
        if not isinstance(arguments, list) or not arguments:
            raise ValueError(f"choice takes a list of values, got {shown(arguments)}")
        return Domain(kind, tuple(arguments))
    types = (int,) if "int" in kind else (int, float)
    wanted = "[low, high, q]" if BOUNDED[kind] == 3 else "[low, high]"
    if (
        not isinstance(arguments, list)
        or len(arguments) != BOUNDED[kind]
        or not all(isinstance(x, types) and not isinstance(x, bool) for x in arguments)
    ):
        what = "whole numbers" if "int" in kind else "numbers"
        raise ValueError(f"{kind} takes {wanted}, {what}, got {shown(arguments)}")
    low, high, *rest = arguments
    largest = LARGEST_WHOLE if "int" in kind else LARGEST_FLOAT
    if not all(-largest <= x <= largest for x in arguments):  # refuses NaN too
        raise ValueError(f"{kind}: expected numbers of at most {largest:g}, got {shown(arguments)}")
    if low >= high:
        raise ValueError(f"{kind}: low has to be less than high, got {shown(arguments)}")
    if "log" in kind and low <= 0:
        raise ValueError(f"{kind}: low has to be above 0, got {shown(arguments)}")
    if not rest:
        # As in Ray Tune: the upper end of integers is excluded, unless they are quantised.
        is_integer = "int" in kind
        return Domain(kind, (), float(low), float(high - is_integer), 1.0 if is_integer else None)
    step = rest[0]
    if step <= 0:
        raise ValueError(f"{kind}: q has to be above 0, got {shown(arguments)}")
    if max(abs(low), abs(high)) / step > LARGEST_WHOLE:
        raise ValueError(f"{kind}: q is too small for numbers of that size, got {shown(arguments)}")
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    first = max(first, 1) if "log" in kind else first
    if first > last:
        raise ValueError(f"{kind}: no multiple of q between low and high, got {shown(arguments)}")
    return Domain(kind, (), round(float(first * step), 12), round(float(last * step), 12), float(step))


def shown(value: Any) -> str:
    """A value as YAML text, shortened."""
    if fault(value, MOST_SHOWN):
        return given(value)
    return cut(json.dumps(value, ensure_ascii=False), SHOWN_PATH)


class SearchConfig(BaseModel):
    """The `search` section of a sweep file: the space, the algorithm and the number of trials."""

    model_config = STRICT

    space: Annotated[dict[str, Any], plain(100_000)] = Field(
        min_length=1, max_length=200, description="dotted field → domain by Ray Tune's names, or a list"
    )
    algorithm: Literal["random", "optuna"] = Field(
        default="random", description="random points, or Optuna's TPE (needs dfkd_ray[search])"
    )
    num_trials: Annotated[int, NUMBER] = Field(ge=1, le=MOST_TRIALS, description="distinct points tried")
    max_concurrent: Annotated[int, Field(ge=1, le=MOST_TRIALS), NUMBER] | None = Field(
        default=None, description="trials at once; null: as many as there is room for"
    )
    seed: Seed = Field(default=0, description="of the points; seeds of a trial stand in base")
    objective: Objective = Field(
        default="reference_kl", description="optuna: what it looks for, the lowest; the highest latency_ratio"
    )
    bounds: dict[Objective, Annotated[float, NUMBER]] = Field(
        default_factory=dict,
        description="optuna: what the best point keeps: at most so much; of latency_ratio, at least so much",
    )

    @model_validator(mode="after")
    def _points_depend_on_results(self) -> "SearchConfig":
        if self.algorithm != "optuna" and (self.bounds or self.objective != "reference_kl"):
            raise ValueError("objective and bounds act with algorithm=optuna only: random points depend on no result")
        if self.objective in self.bounds:
            raise ValueError(f"bounds.{self.objective}: it is the objective; bound something else")
        return self

    @field_validator("space")
    @classmethod
    def _domains(cls, space: dict[str, Any]) -> dict[str, Any]:
        errors = []
        for name, values in space.items():
            if wrong := name_fault(name):
                errors.append(f"{named(name)}: {wrong}")
                continue
            try:
                domain(values)
            except ValueError as error:
                errors.append(f"{name}: {error}")
            errors += [
                f"{name}: is the same in all trials of a search; set it in base"
                for fixed in FIXED
                if (name + ".").startswith(fixed + ".")
            ]
            errors += [f"{name}: lies within {other}; search one of them" for other in space if within(name, other)]
        if errors:
            raise ValueError("; ".join(errors[:3]) + ("; …" if len(errors) > 3 else ""))
        return space

    @property
    def domains(self) -> dict[str, Domain]:
        """Dotted field → domain, in the file's order."""
        return {name: domain(written) for name, written in self.space.items()}


class AshaConfig(BaseModel):
    """Asynchronous successive halving. Source: Li et al. 2018, arXiv 1810.05934, algorithm 2."""

    model_config = STRICT

    grace_looks: Count = Field(
        default=1,
        ge=1,
        description="looks at the reference set (distillation.eval_every) before a trial may be stopped",
    )
    reduction_factor: Annotated[float, NUMBER] = Field(
        default=3.0, gt=1, le=1e6, description="at each rung the best 1/n go on; rungs are a factor n of steps apart"
    )


class StopConfig(BaseModel):
    """Early stopping: ends trials that are farther from the teacher than others at the same distillation step."""

    model_config = STRICT

    asha: AshaConfig = AshaConfig()


def loss(name: str, row: Mapping[str, Any]) -> float | None:
    """An objective's value in a row, negative where larger is better; None if the row has none."""
    value = number_in(row, name)
    if value is None:
        value = IN_TEACHERS_SHAPE.get(name)
    return None if value is None else -value if name in LARGER_IS_BETTER else value


def excess(search: SearchConfig, row: Mapping[str, Any]) -> dict[str, float]:
    """By how much a row is outside each bound: positive outside, infinite where it has no value."""
    found = {}
    for name, bound in search.bounds.items():
        own, limit = loss(name, row), loss(name, {name: bound})
        assert limit is not None
        found[name] = math.inf if own is None else own - limit
    return found


def within(name: str, other: str) -> bool:
    """Whether dotted field `name` is a part of section `other`."""
    return name.startswith(other + ".")


def random_points(search: SearchConfig) -> Iterator[Point]:
    """An endless stream of points; point i is a function of (space, seed, i), the same in every process and run."""
    domains = sorted(search.domains.items())
    for index in itertools.count():
        # random() of a seeded Random is the only draw that Python guarantees to keep between versions.
        draws = random.Random(mix_seed(search.seed, index))
        yield {name: values.at(draws.random()) for name, values in domains}


def probes(search: SearchConfig) -> list[Point]:
    """Points that cover every choice, both ends of every domain and one number between them.

    The first point is the lower corner; each other one differs from it in one field.
    """
    domains = search.domains
    corner = {name: values.ends()[0] for name, values in domains.items()}
    others = {name: (*values.ends()[1:], values.at(0.382)) for name, values in domains.items()}
    return [corner, *({**corner, name: value} for name in others for value in others[name] if value != corner[name])]


def can_match(entry: Mapping[str, Any], search: SearchConfig, fixed: Mapping[str, Any]) -> bool:
    """Whether an `exclude` entry can match a point of the space; `fixed` holds the values of all other fields."""
    domains = search.domains
    sections = [name for name in domains if any(within(field, name) for field in entry)]
    return all(
        any(domains[field].holds(value) for value in options(wanted))
        if field in domains
        else any(within(field, section) for section in sections)
        or any(alike(fixed.get(field), value) for value in options(wanted))
        for field, wanted in entry.items()
    )


def options(wanted: Any) -> Sequence[Any]:
    """The values of a field in an `exclude` entry, always as a list."""
    return wanted if isinstance(wanted, list) else [wanted]


def is_one_of(value: Any, wanted: Sequence[Any]) -> bool:
    """Whether a value is among `wanted`; unlike Python's `in`, true is not 1 (see `alike`)."""
    return value in wanted and any(alike(value, one) for one in wanted)
