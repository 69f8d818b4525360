"""What a table in a document is made of: the YAML of its comment, validated before any row is read.

    rows: {metric: {reconstructed_points_lost: reconstructed, points_lost: "**recovered**"}}
    columns: {pruning.sparsity: [0.75, 0.9]}

An axis is a level, or a list of levels that are crossed. A level is one of

* a column of the rows and its values: a list, or a mapping of values to labels; the name alone takes all its values,
* `metric` and names of metrics, in the same two forms,
* `entries` and a mapping of labels to conditions (column → value, or a list of values). Beside its conditions each may
  name its own metric: `{reconstructed: {synthesis.method: adi, metric: reconstructed_points_lost}}`.

Which columns and metrics there are depends on the rows: those of trials, or the labels and numbers of a bench's
measurements. With `of: choice` the column is `network`, and the metrics are those of `aggregates.regret`. A
specification is validated with their `Vocabulary`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, model_validator

from dfkd_ray.config import STRICT
from dfkd_ray.plain import fault, given
from dfkd_ray.results import metrics
from dfkd_ray.results.metrics import Metric
from dfkd_ray.results.schemas import schema
from dfkd_ray.results.selecting import column_of

Info = Any  # pydantic.ValidationInfo: a protocol that cannot be checked at run time
METRIC, ENTRIES, CHOICE = "metric", "entries", "choice"
MOST_VALUES = 1000  # of a specification
FORMS = "a column with its values, metric with names, or entries with conditions"


@dataclass(frozen=True)
class Vocabulary:
    """The columns and the metrics of rows. `what`: of what the metrics are, for errors."""

    columns: Sequence[str]
    metrics: Mapping[str, Metric]
    what: str

    def column(self, name: Any) -> str:
        """The column that a name, or the end of one, means."""
        return column_of(str(name), self.columns)

    def metric(self, name: Any) -> Metric:
        """The metric of this name. `ValueError`, with a suggestion, if there is none."""
        return metrics.known(str(scalar(name)), self.metrics, self.what)


TRIALS = Vocabulary(schema("trials").names, metrics.KNOWN, "a trial")


class Level(BaseModel):
    """One level of an axis. `entries`: label → conditions; None: all values of the column. `metrics`: by label."""

    model_config = STRICT

    column: str | None = None
    entries: dict[str, dict[str, Any]] | None = None
    metrics: dict[str, str] = Field(default_factory=dict)


class Format(BaseModel):
    """How a metric is shown."""

    model_config = STRICT

    decimals: int = Field(default=2, ge=0, le=9, description="digits behind the point")
    times: float = Field(default=1.0, gt=0, description="factor before it is shown; 100: a share in percent")


def words_of(info: Info) -> Vocabulary:
    """The vocabulary that a specification is validated with; that of trials where none is given."""
    return info.context if isinstance(info.context, Vocabulary) else TRIALS


def axis_of(value: Any, info: Info) -> Any:
    """The levels of an axis, from its plain data. `ValueError` for anything else."""
    if wrong := fault(value, MOST_VALUES):
        raise ValueError(wrong)
    words = words_of(info)
    levels = [level_of(one, words) for one in (value if isinstance(value, list) else [value])]
    if not levels:
        raise ValueError(f"an axis without levels; expected {FORMS}")
    return levels


def level_of(value: Any, words: Vocabulary) -> dict[str, Any]:
    """One level, from its plain data."""
    if isinstance(value, str) and value not in (METRIC, ENTRIES):
        return {"column": words.column(value)}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"{given(value)}: expected {FORMS}; several levels are a list")
    ((name, values),) = value.items()
    if not isinstance(values, Mapping | list) or not values:
        raise ValueError(f"{given(name)}: expected a list of values, or values with labels, got {given(values)}")
    if name == ENTRIES:
        if not isinstance(values, Mapping):
            raise ValueError(f"{ENTRIES}: expected labels with conditions, as in {{mine: {{real_data: false}}}}")
        labelled = {label(text): own for text, own in values.items()}
        if len(labelled) < len(values):
            raise ValueError(f"{ENTRIES}: two of them have the same label")
        return level_of_entries(labelled, words)
    if isinstance(values, Mapping):
        labels = {label(text): one for one, text in values.items()}
    else:
        labels = {None if one is None else str(scalar(one)): one for one in values}
    if len(labels) < len(values):
        raise ValueError(f"{given(name)}: two of its values have the same label")
    if name == METRIC:
        found = {str(text): words.metric(one).name for text, one in labels.items()}
        return {"entries": {text: {} for text in found}, "metrics": found}
    own = words.column(name)
    return {"column": own, "entries": {shown(text, one): {own: one} for text, one in labels.items()}}


def level_of_entries(values: Mapping[str, Any], words: Vocabulary) -> dict[str, Any]:
    """A level of conditions by label; each of them names a metric, or none does."""
    found = {
        text: words.metric(own[METRIC]).name
        for text, own in values.items()
        if isinstance(own, Mapping) and METRIC in own
    }
    if found and len(found) < len(values):
        missing = next(text for text in values if text not in found)
        raise ValueError(f"{ENTRIES}: {given(missing)} names no {METRIC}, and others do")
    rest = {
        text: {name: one for name, one in own.items() if name != METRIC} if isinstance(own, Mapping) else own
        for text, own in values.items()
    }
    return {"entries": {text: conditions(own, words) for text, own in rest.items()}, "metrics": found}


def shown(text: str | None, value: Any) -> str:
    """The label of a value: what was given, else the value as YAML writes it."""
    if text is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else text


def label(text: Any) -> str:
    """A label in one line."""
    line = " ".join(str(text).split()) if isinstance(text, str | int | float) else ""
    if not line:
        raise ValueError(f"{given(text)}: expected a label")
    return line


def scalar(value: Any) -> Any:
    """A value of a column: no list and no mapping."""
    if isinstance(value, list | Mapping):
        raise ValueError(f"{given(value)}: expected a single value")
    return value


def conditions(where: Any, words: Vocabulary) -> dict[str, Any]:
    """Conditions with the full names of their columns: column → value, or a list of values."""
    if not isinstance(where, Mapping):
        raise ValueError(f"{given(where)}: expected conditions, as in {{pruning.sparsity: 0.75}}")
    for name, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if not values:
            raise ValueError(f"{name}: a list without values meets no row")
        for value in values:
            scalar(value)
    named = {words.column(name): wanted for name, wanted in where.items()}
    if len(named) < len(where):
        raise ValueError("a column is named twice")
    return named


def checked(where: Any, info: Info) -> Any:
    """`conditions` of plain data."""
    if wrong := fault(where, MOST_VALUES):
        raise ValueError(wrong)
    return conditions(where, words_of(info))


def known_metric(name: Any, info: Info) -> Any:
    """The full name of a metric."""
    return None if name is None else words_of(info).metric(name).name


Axis = Annotated[tuple[Level, ...], BeforeValidator(axis_of)]
Conditions = Annotated[dict[str, Any], BeforeValidator(checked)]
MetricName = Annotated[str, BeforeValidator(known_metric)]


class Specification(BaseModel):
    """The comment before a table."""

    model_config = STRICT

    of: Literal["rows", "choice"] = Field(
        default="rows", description="what the table is about: rows, or what the choice without data costs among them"
    )
    rows: Axis = Field(description="what makes a row")
    columns: Axis = Field(description="what makes a column")
    metric: MetricName | None = Field(default=None, description="of all cells, unless an axis has the level metric")
    where: Conditions = Field(default_factory=dict, description="which rows of the file the table is about")
    formats: dict[MetricName, Format] = Field(default_factory=dict, description="metric → how it is shown")
    heading: str = Field(default="", max_length=200, description="of the labels of the rows")
    behind: MetricName | None = Field(
        default=None, description="a metric, equal in all trials of a row, in brackets behind its label"
    )
    sweep: str | None = Field(default=None, description="the sweep file whose about.command made the rows")
    command: str | None = Field(default=None, max_length=1000, description="in place of sweep: the command")
    note: str | None = Field(default=None, max_length=2000, description="the author's words, in the caption")

    _words: Vocabulary = PrivateAttr(default=TRIALS)

    @model_validator(mode="after")
    def _remember_words(self, info: Info) -> "Specification":
        self._words = words_of(info)
        return self

    @model_validator(mode="after")
    def _one_metric_a_cell(self) -> "Specification":
        levels = [level for level in (*self.rows, *self.columns) if level.metrics]
        if len(levels) + (self.metric is not None) != 1:
            raise ValueError("expected one metric a cell: either `metric`, or one level in rows or columns that has it")
        return self

    @model_validator(mode="after")
    def _formats_act(self) -> "Specification":
        idle = [name for name in self.formats if name not in (*self.metrics, self.behind)]
        if idle:
            raise ValueError(f"formats: {idle[0]} is in no cell of this table")
        return self

    @model_validator(mode="after")
    def _one_command(self) -> "Specification":
        if self.sweep is not None and self.command is not None:
            raise ValueError("expected either sweep or command: the sweep file has its command")
        return self

    @model_validator(mode="after")
    def _no_column_on_both_axes(self) -> "Specification":
        seen: set[str] = set(self.where)
        for level in (*self.rows, *self.columns):
            entries = level.entries.values() if level.entries else ()
            own = {level.column} if level.column else {name for entry in entries for name in entry}
            if both := sorted(seen & own):
                raise ValueError(f"{both[0]} is given twice: in where, rows and columns once at most")
            seen |= own
        return self

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics in its cells."""
        if self.metric is not None:
            return [self.metric]
        names = [name for level in (*self.rows, *self.columns) for name in level.metrics.values()]
        return list(dict.fromkeys(names))

    def metric_of(self, name: str) -> Metric:
        """The metric of this name."""
        return self._words.metric(name)

    def format_of(self, name: str) -> Format:
        """How a metric is shown."""
        known = self.metric_of(name)
        return self.formats.get(name, Format(decimals=known.decimals, times=known.times))
