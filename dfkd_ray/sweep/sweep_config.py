"""SweepConfig, the pydantic model of a sweep file (its sections `search` and `stop`: search.py). Reads no file.

The number of trials is computed and bounded before any trial config is made.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from dfkd_ray.config import STRICT, Effort, TrialConfig, flat, validate
from dfkd_ray.config.fields import NUMBER, UNION_TAGS, hint, known_fields, plain, value_fault
from dfkd_ray.config.parsing import MOST_VALUES, name_fault
from dfkd_ray.plain import LARGEST, fault, given, named
from dfkd_ray.sweep.expectations import Expectation
from dfkd_ray.sweep.search import MOST_TRIALS, SearchConfig, StopConfig

MOST_AXES_SHOWN = 6
SEED_FIELDS = ("synthesis.seed", "distillation.seed")  # what `seeds` varies
SETTINGS = "sweep.yaml"  # in a results place: the last sweep file that ran there
Line = Annotated[str, plain(1, 20_000)]
SENTENCE, RANGES = UNION_TAGS
Expected = Annotated[
    Annotated[Line, Tag(SENTENCE)] | Annotated[list[Expectation], Field(min_length=1, max_length=1000), Tag(RANGES)],
    Discriminator(lambda value: RANGES if isinstance(value, list) else SENTENCE),
]


class About(BaseModel):
    """Notes for readers of a sweep file: its source, command, cost and expected result."""

    model_config = STRICT

    source: Line
    command: Line
    cost: Line
    expected: Expected = Field(description="a sentence, or ranges that are checked")


class SweepConfig(BaseModel):
    """The contents of a sweep file."""

    model_config = STRICT

    about: About | None = Field(default=None, description="for readers; shipped sweeps have it")
    base: Annotated[dict[str, Any], plain(2000)] = Field(
        default_factory=dict, description="a trial config; what it leaves out has defaults"
    )
    effort: Effort = Field(
        default="standard", description="the fields of an effort, in each trial beneath what base and point set"
    )
    grid: dict[str, list[Any]] | list[dict[str, list[Any]]] | None = Field(
        default=None, description="dotted field → values; or several"
    )
    search: SearchConfig | None = Field(default=None, description="in place of grid: points drawn from domains")
    exclude: Annotated[list[dict[str, Any]], plain(10_000)] = Field(
        default_factory=list,
        max_length=1000,
        description="dotted field → value or list of values; what matches all of one is left out",
    )
    seeds: Annotated[int, NUMBER] = Field(
        default=1,
        ge=1,
        le=MOST_TRIALS,
        description="seeds 0 … n - 1 of synthesis and distillation for every combination",
    )
    stop: StopConfig | None = Field(default=None, description="early stopping; null: every trial runs to its end")
    tiny: Annotated[dict[str, Any], plain(2000)] = Field(
        default_factory=dict, description="dotted field → value, for a tiny run"
    )

    @field_validator("grid", mode="before")
    @classmethod
    def _axes_with_values(cls, grid: Any) -> Any:
        if grid is not None and (wrong := grid_fault(grid)):
            raise ValueError(wrong)
        return grid

    @field_validator("exclude")
    @classmethod
    def _partial_points(cls, exclude: list[dict[str, Any]]) -> list[dict[str, Any]]:
        refuse_unknown(name for entry in exclude for name in entry)
        if {} in exclude:
            raise ValueError("an entry without fields would leave out every trial")
        return exclude

    @field_validator("tiny")
    @classmethod
    def _known_fields_and_values(cls, tiny: dict[str, Any]) -> dict[str, Any]:
        refuse_unknown(tiny)
        wrong = [f"{name}: {found}" for name, value in tiny.items() if (found := value_fault(TrialConfig, name, value))]
        if wrong:
            raise ValueError("; ".join(wrong[:3]) + ("; …" if len(wrong) > 3 else ""))
        return tiny

    @model_validator(mode="after")
    def _grid_or_search(self) -> "SweepConfig":
        if (self.grid is None) == (self.search is None):
            raise ValueError("expected either grid or search, and one of them")
        if self.search is not None and self.seeds != 1:
            raise ValueError(
                f"seeds={self.seeds} goes with grid; a search tries every point with one seed: leave seeds out, and "
                "run the best points as a grid with several"
            )
        if self.seeds > 1 and (fixed := self.own_seeds()):
            raise ValueError(
                f"seeds={self.seeds} runs every combination with seeds 0 to {self.seeds - 1}, and {fixed[0]} is set "
                "too: leave one of the two out"
            )
        if self.search is not None and self.stop is not None and self.search.objective != "reference_kl":
            raise ValueError(
                f"stop ends trials by their reference_kl, and search.objective is {self.search.objective}: leave stop "
                "out, or search for the lowest reference_kl with a bound on the other"
            )
        if self.search is not None and self.about is not None and isinstance(self.about.expected, list):
            raise ValueError(
                "about.expected: ranges go with grid, whose trials are known; for a search write a sentence"
            )
        if self.num_points > MOST_TRIALS:
            raise ValueError(
                f"the grid asks for {count_text(self.num_points)} trials, more than the {MOST_TRIALS:,} that one sweep "
                f"may have: {axes_text(self)}"
            )
        return self

    def own_seeds(self) -> list[str]:
        """The seeds that base or grid set themselves."""
        told = dict.fromkeys(flat(self.base))
        for grid in self.grids:
            for name, values in grid.items():
                told |= dict.fromkeys((name, *(f"{name}.{part}" for part in parts_of(values))))
        return [name for name in SEED_FIELDS if name in told]

    @property
    def grids(self) -> list[dict[str, list[Any]]]:
        """The grids: one, several, or none."""
        return self.grid if isinstance(self.grid, list) else [] if self.grid is None else [self.grid]

    @property
    def num_points(self) -> int:
        """The number of combinations of all grids and seeds, duplicates included."""
        return sum(math.prod(map(len, grid.values())) for grid in self.grids) * self.seeds


def parse(data: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Validate the plain data of a sweep file. `ValueError` with all errors, each prefixed by `where`."""
    return validate(SweepConfig, data, where)


def grid_fault(grid: Any) -> str | None:
    """Why this is neither a grid nor a list of grids; None if it is one."""
    if wrong := fault(grid, MOST_VALUES):
        return wrong
    for one in grid if isinstance(grid, list) and grid else [grid]:
        if not isinstance(one, Mapping) or not one:
            return f"expected fields with their values, as in {{pruning.sparsity: [0.5, 0.9]}}, got {given(one)}"
        places = {name: place for place, name in enumerate(one)}
        for name, values in one.items():
            if wrong := name_fault(name):
                return f"{named(name)}: {wrong}"
            if not isinstance(values, list):
                return f"{named(name)}: expected a list of values, got {given(values)}"
            if not values:
                return f"{named(name)}: a list without values leaves no trial; leave the field out"
            for parent in (name[:i] for i, sign in enumerate(name) if sign == "."):
                if places.get(parent, -1) > places[name]:
                    return f"{named(name)}: would be replaced by {named(parent)}, of which it is a part; put it below"
    return None


def refuse_unknown(names: Any) -> None:
    """`ValueError` for the first name that is not a field of a trial."""
    for name in names:
        if name not in known_fields(TrialConfig) and not name.startswith("student.arguments."):
            raise ValueError(f"{named(name)}: unknown field{hint(TrialConfig, name)}")
        if wrong := name_fault(name):
            raise ValueError(f"{named(name)}: {wrong}")


def count_text(number: int) -> str:
    """A count as text; a huge one as a power of ten."""
    return f"{number:,}" if number < LARGEST else f"more than 10^{int(math.log10(number))}"


def axes_text(sweep: SweepConfig) -> str:
    """The number of values on each axis of the largest grid, as text."""
    grid = max(sweep.grids, key=lambda grid: math.prod(map(len, grid.values())))
    sizes = [(name, len(values)) for name, values in grid.items()] + [("seeds", sweep.seeds)]
    longest = sorted((size for size in sizes if size[1] > 1), key=lambda size: -size[1])
    text = " x ".join(f"{num:,} of {named(name)}" for name, num in longest[:MOST_AXES_SHOWN])
    more = f" x {len(longest) - MOST_AXES_SHOWN} fields more" if len(longest) > MOST_AXES_SHOWN else ""
    others = f"; and {len(sweep.grids) - 1} grids more" if len(sweep.grids) > 1 else ""
    return text + more + others


def parts_of(values: Sequence[Any]) -> dict[str, None]:
    """The dotted field names inside those values that are mappings."""
    return dict.fromkeys(name for value in values if isinstance(value, Mapping) for name in flat(value))
