"""Short names of trials: teacher, method, and the fields in which the trials of a sweep differ."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dfkd_ray.cli import tables
from dfkd_ray.config import LEFT_OUT, OF_TEACHER, TrialConfig, flat, follows
from dfkd_ray.text import last_parts, shown

Parts = Mapping[str, str]  # heading → text, in the order of the name
NAMED = ("teacher", "synthesis.method", "pruning.sparsity")
STRUCTURE, WEIGHTS = "pruning.structure", "student.weights"


def name_of(values: Mapping[str, Any], differing: Sequence[str]) -> str:
    """The name of a trial with these (dotted) fields; `differing` are those that differ between trials."""
    return name_from(parts_of_one(values, differing))


def name_from(parts: Parts) -> str:
    """The parts of a name joined into one line."""
    bare = ("network", "method")
    words = (value if name in bare else f"{name.rpartition('.')[2]} {value}" for name, value in parts.items())
    # Two fields with equal last part and value, such as the seeds of synthesis and distillation, appear once.
    return shown(" ".join(dict.fromkeys(words)))


def parts_of(trials: Mapping[str, TrialConfig]) -> dict[str, Parts]:
    """The parts of each trial's name."""
    # One without channels leaves its structure out, one without a file of its student's the file.
    structure = {name: LEFT_OUT[name] for name in (STRUCTURE, WEIGHTS)}
    plain = {name: structure | flat(config.model_dump(mode="json")) for name, config in trials.items()}
    fields = dict.fromkeys(field for values in plain.values() for field in values)
    differing = [
        field
        for field in fields
        if field not in NAMED and len({str(v[field]) for v in plain.values() if field in v}) > 1
    ]
    if OF_TEACHER in differing and is_of_teacher(plain.values()):
        differing.remove(OF_TEACHER)
    called = last_parts(str(values["teacher"]) for values in plain.values())
    return {name: parts_of_one(values, differing, called) for name, values in plain.items()}


def is_of_teacher(trials: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the reference set's BatchNorm weight is the same in trials with one teacher: its name then says it."""
    seen = {(values["teacher"], values[OF_TEACHER]) for values in trials if OF_TEACHER in values}
    return len(seen) == len({teacher for teacher, _ in seen})


def parts_of_one(values: Mapping[str, Any], differing: Sequence[str], called: Mapping[str, str] | None = None) -> Parts:
    """The parts of the name of a trial with these fields; `called`: teachers by the names that tell them apart."""
    teacher = str(values["teacher"])
    network = last_parts([teacher])[teacher] if called is None else called[teacher]
    parts = {"network": network, "method": str(values["synthesis.method"])}
    parts["sparsity"] = short(values["pruning.sparsity"])
    fields = [field for field in differing if field in values and field not in NAMED and not follows(field)]
    return parts | {field: short(values[field]) for field in fields}


def differing_parts(parts: Mapping[str, Parts]) -> tuple[dict[str, Parts], str]:
    """The parts in which trials differ, without the common text of the networks' names; and the common text."""
    networks = sorted({each["network"] for each in parts.values()})
    start, end = tables.shared(networks)
    once = [f"{start}…{end}"] if start or end else []
    same = set()
    if len(parts) > 1:
        for heading in ("network", "method"):
            values = {each[heading] for each in parts.values()}
            if len(values) == 1:
                same.add(heading)
                once += values
    kept: dict[str, Parts] = {}
    for name, each in parts.items():
        network = each["network"]
        whole = {**each, "network": network[len(start) : len(network) - len(end)]}
        kept[name] = {heading: value for heading, value in whole.items() if heading not in same}
    return kept, ", ".join(once)


def short(value: Any) -> str:
    """A value as short text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
