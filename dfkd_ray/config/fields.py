"""Field types of configs with their bounds, and the validation of plain data with readable errors.

Every accepted value can be hashed, written to a table, and held by float32 or a seed. Booleans and text are not taken
for numbers. All errors are reported together, one line each with the field's path.
"""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
)

from dfkd_ray.plain import LARGEST, MOST_SIGNS, fault, given, named, text_fault

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
MOST_ERRORS = 20  # error lines in one message


def _a_number(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):  # which pydantic takes for numbers
        raise ValueError("input should be a number")
    return value


def _a_text(value: str) -> str:
    if wrong := text_fault(value):
        raise ValueError(wrong)
    return value


def plain(most: int, most_signs: int = MOST_SIGNS) -> BeforeValidator:
    """A validator: plain data with at most `most` values, which can be hashed and written to a table."""

    def check(value: Any) -> Any:
        if wrong := fault(value, most, most_signs):
            raise ValueError(wrong)
        return value

    return BeforeValidator(check)


# A bound given here wins over the same one of a field: `Count` and `Number` leave the lower one to it.
NUMBER = BeforeValidator(_a_number)
LARGEST_FLOAT = 1e38  # float32 ends at 3.4e38
Seed = Annotated[int, Field(ge=0, le=LARGEST), NUMBER]
Count = Annotated[int, Field(le=10**9), NUMBER]
BatchSize = Annotated[int, Field(ge=2, le=10**6), NUMBER]
AUTO = "auto"  # replaced by a number before a trial has an id: `dfkd_ray.synthesis.pinned`
AUTO_OR_NUMBER = "auto or a number"  # pydantic's name for the second kind of value of such a field
UNION_TAGS = ("a sentence", "a list of ranges")  # the same of a sweep file's about.expected
ImageSize = Annotated[int, Field(ge=8, le=4096), NUMBER]
Pixels = Annotated[int, Field(ge=0, le=256), NUMBER]
Number = Annotated[float, Field(le=LARGEST_FLOAT), NUMBER]
Share = Annotated[float, Field(le=1), NUMBER]
Weight = Annotated[float, Field(ge=0, le=LARGEST_FLOAT), NUMBER]
Rate = Annotated[float, Field(gt=0, le=LARGEST_FLOAT), NUMBER]
if TYPE_CHECKING:
    AutoBatchSize: TypeAlias = int
    AutoWeight: TypeAlias = float
    AutoRate: TypeAlias = float
else:
    AutoBatchSize, AutoWeight, AutoRate = (
        Annotated[
            Annotated[number, Tag(AUTO_OR_NUMBER)] | Annotated[Literal["auto"], Tag(AUTO)],
            Discriminator(lambda value: AUTO if value == AUTO else AUTO_OR_NUMBER),
        ]
        for number in (BatchSize, Weight, Rate)
    )
Threads = Annotated[
    int, Field(ge=1, le=1024, description="CPU threads; gradients differ in the last bits with it"), NUMBER
]
Precision = Literal["bfloat16", "tf32", "float32"]
Storage = Literal["uint8", "float16", "float32"]
Name = Annotated[str, Field(min_length=1), AfterValidator(_a_text)]
Arguments = Annotated[dict[str, Any], plain(1000)]


def method_of(value: Any) -> str:
    """The synthesis method of a config or of its plain data; an unknown name if it is not text."""
    if isinstance(value, Mapping):
        method = value.get("method", "deepinversion")
        return method if isinstance(method, str) else given(method)
    return str(getattr(value, "method", "deepinversion"))


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Mapping[str, Any], where: str = "config", *, context: Any = None) -> Model:
    """Build a config from plain data. `ValueError` with all errors, one line each with the field's path.

    After `MOST_ERRORS` lines the rest are only counted. `context`: what the model's validators need to know.
    """
    try:
        return model.model_validate(dict(data) if isinstance(data, Mapping) else data, context=context)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise ValueError("\n".join(first_of((describe(model, e, where) for e in errors), len(errors)))) from None


def first_of(lines: Iterable[str], num: int) -> list[str]:
    """The first `MOST_ERRORS` of `num` error lines, and a line with the number of the others."""
    shown = list(itertools.islice(lines, MOST_ERRORS))
    return shown if num <= MOST_ERRORS else [*shown, f"and {num - MOST_ERRORS:,} errors more"]


def describe(model: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    """One pydantic error as one line: where, what was given, what was expected."""
    path = path_of(model, error["loc"])
    value = error.get("input")
    message = error["msg"].removeprefix("Value error, ").replace(f"{LARGEST_FLOAT:.0f}", f"{LARGEST_FLOAT:g}")
    message = message[0].lower() + message[1:]
    if error["type"] == "extra_forbidden":
        section, dot, name = str(error["loc"][-1]).rpartition(".")
        is_dotted = dot and path in known_fields(model)
        message = f"write it nested, {section}: {{{name}: …}}" if is_dotted else f"unknown field{hint(model, path)}"
    elif error["type"] == "missing":
        message = "missing, a value is needed"
    elif error["type"] == "union_tag_invalid":
        path = f"{path}.method" if path else "method"
        expected = error["ctx"]["expected_tags"].replace("'", "")
        method = value.get("method") if isinstance(value, Mapping) else value
        message = f"unknown method {given(method)}; expected {expected}"
    elif error["type"] in ("model_type", "dict_type"):
        message = f"input should be a mapping of fields (given: {given(value)})"
    elif not isinstance(value, Mapping | BaseModel):
        message += ", or auto" if AUTO_OR_NUMBER in error["loc"] else ""
        message += f" (given: {given(value)})"
    return ": ".join([*(named(part) for part in (where, path) if part), message])


def path_of(model: type[BaseModel], places: Iterable[int | str]) -> str:
    """The dotted field of a pydantic error location, without the tags by which pydantic chooses a union's member."""
    path, models = [], [model]
    for place in places:
        tags = {one.model_fields["method"].default for one in models if "method" in one.model_fields}
        if (len(models) > 1 and place in tags) or place in (AUTO_OR_NUMBER, *UNION_TAGS):
            continue
        path.append(str(place))
        fields = [one.model_fields[place] for one in models if place in one.model_fields]
        models = [inner for field in fields for inner in nested_models(field.annotation)]
    return ".".join(path)


@lru_cache(maxsize=1000)
def hint(model: type[BaseModel], path: str) -> str:
    """A "did you mean" hint for an unknown field of `model`; empty if no field is similar."""
    names = [name for name in known_fields(model) if name != path] if len(path) < 100 else []
    close = difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Every dotted field name below `model`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in nested_models(field.annotation):
            yield from field_paths(kind, f"{prefix}{name}.")


@lru_cache
def known_fields(model: type[BaseModel]) -> dict[str, None]:
    """Every dotted field name below `model`, each once."""
    return dict.fromkeys(field_paths(model))


def value_fault(model: type[BaseModel], name: str, value: Any) -> str | None:
    """Why a value is invalid for a dotted field of `model`, whatever the other fields are; None if it may be valid."""
    errors: Sequence[Mapping[str, Any]] = []
    for adapter in adapters(model, name):
        try:
            adapter.validate_python(value)
            return None
        except ValidationError as error:
            errors = errors or error.errors(include_url=False)
    return describe(model, errors[0], "") if errors else None


@lru_cache(maxsize=1000)
def adapters(model: type[BaseModel], name: str) -> list[Any]:
    """The pydantic adapters that validate a dotted field alone: one per union member that has the field."""
    models: list[type[BaseModel]] = [model]
    fields: list[Any] = []
    for part in name.split("."):
        fields = [one.model_fields[part] for one in models if part in one.model_fields]
        models = [inner for field in fields for inner in nested_models(field.annotation)]
    kinds: list[Any] = [Annotated[(field.annotation, field)] for field in fields]
    return [TypeAdapter(kind) for kind in kinds]


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in an annotation, through unions and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in nested_models(part)]
