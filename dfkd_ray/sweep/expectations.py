"""Ranges that a sweep file expects its results to be in (`about.expected`). Pure; checking.py compares them with rows.

expected:
  - {where: {pruning.sparsity: 0.75}, metric: points_lost, at_most: 0.5}
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from dfkd_ray.config import LEFT_OUT, STRICT, TrialConfig, columns_of
from dfkd_ray.config.fields import Number, hint, known_fields, plain, value_fault
from dfkd_ray.plain import given, named
from dfkd_ray.results.metrics import metric
from dfkd_ray.results.schemas import SEEDS
from dfkd_ray.sweep.search import is_one_of, options

Columns = Mapping[str, Any]  # of a trial's config: dotted field → value
NUM_NAMED = 3  # fields in a message


def _known_metric(name: str) -> str:
    return metric(name).name


def _known_fields(where: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, wanted in where.items():
        if name not in known_fields(TrialConfig):
            raise ValueError(f"{named(name)}: unknown field{hint(TrialConfig, name)}")
        for value in wanted if isinstance(wanted, list) else [wanted]:
            if wrong := value_fault(TrialConfig, name, value):
                raise ValueError(f"{named(name)}: {wrong}")
    return where


class Expectation(BaseModel):
    """A range for a metric of the trials that have these values.

    Trials of `of: mean` differ in seeds only. `of: best` takes one trial, the nearest to its teacher on the reference
    set: the lowest `reference_kl`.
    """

    model_config = STRICT

    where: Annotated[dict[str, Any], plain(1000), AfterValidator(_known_fields)] = Field(
        default_factory=dict, description="dotted field → value, or a list of values: which trials"
    )
    metric: Annotated[str, AfterValidator(_known_metric)] = Field(
        description="a number of their rows in its unit there (shares in [0, 1]), or points_lost"
    )
    at_least: Annotated[Number | None, Field(ge=-1e38)] = Field(default=None, description="in the metric's unit")
    at_most: Annotated[Number | None, Field(ge=-1e38)] = Field(default=None, description="in the metric's unit")
    of: Literal["mean", "best"] = Field(
        default="mean", description="mean over seeds, or the trial with the lowest reference_kl"
    )
    text: str | None = Field(default=None, max_length=1000, description="for readers")

    @model_validator(mode="after")
    def _a_range(self) -> "Expectation":
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise ValueError("expected at_least, at_most or both")
        if low is not None and high is not None and low > high:
            raise ValueError(f"at_least={low:g} is above at_most={high:g}: no number is in this range")
        return self

    def holds(self, value: float) -> bool:
        """Whether a value is in the range, its ends included."""
        low, high = self.at_least, self.at_most
        return (low is None or value >= low) and (high is None or value <= high)


def faults(expected: Sequence[Expectation], configs: Sequence[TrialConfig]) -> list[str]:
    """Why ranges of a sweep file are of none of its trials, or of trials that differ in more than seeds."""
    columns = [columns_of(config) for config in configs]
    wrong = []
    for index, one in enumerate(expected):
        try:
            matched(one, columns, f"about.expected.{index}")
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def matched(one: Expectation, configs: Sequence[Columns], where: str) -> list[int]:
    """The places of the configs that an expectation is about."""
    places = [place for place, config in enumerate(configs) if is_of(one, config)]
    if not places:
        raise ValueError(f"{where}: no trial of the sweep has {given(one.where)}")
    if one.of == "mean":
        own = [configs[place] for place in places]
        names = dict.fromkeys(name for config in own for name in config if name not in SEEDS)
        varied = [name for name in names if len({repr(config.get(name)) for config in own}) > 1]
        if varied:
            raise ValueError(
                f"{where}: a mean over {len(own)} trials that differ in {', '.join(varied[:NUM_NAMED])}, not in seeds "
                "alone: say which in where, or write of: best"
            )
    elif len({configs[place]["teacher"] for place in places}) > 1:
        raise ValueError(f"{where}: the best of several teachers' students; say which teacher in where")
    return places


def is_of(one: Expectation, config: Columns) -> bool:
    """Whether an expectation is about a trial."""
    values = {name: config.get(name, LEFT_OUT.get(name)) for name in one.where}
    return all(is_one_of(values[name], options(wanted)) for name, wanted in one.where.items())
