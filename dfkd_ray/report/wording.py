"""Turns numbers and findings into text for the report."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dfkd_ray.ladder import STUDENTS
from dfkd_ray.text import is_null, shown

# pandas types every selection as frame, series or array, which is useless for a type checker.
Frame = Any
Series = Any
MEASURES = {"accuracy": "test accuracy", "agreement": "agreement with the teacher"}
RUNG_NAMES = {rung.name: rung.label for rung in STUDENTS}
NUM_NAMED = 4  # networks lines of in the lead
CHOICE_NOTE = (
    "Rank correlation (Spearman) of the reference KL with the points of test accuracy lost, over all trials and at "
    "one sparsity. Regret: points that the trial of the lowest KL loses against the best trial of its sparsity."
)


def number(value: Any, digits: int = 2, scale: float = 1.0) -> str:
    """A scaled number with a proper minus, or `–` for null; never `-0.00`."""
    if is_null(value):
        return "–"
    text = f"{scale * float(value):,.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.,") else text.replace("-", "−")


def percent(value: Any) -> str:
    """A fraction in percent: `93.95 %`, kept on one line."""
    return "–" if is_null(value) else f"{number(value, 2, 100.0)}\u00a0%"


def plus_minus(mean: Any, std: Any, scale: float = 100.0, digits: int = 2) -> str:
    """`0.26 ± 0.03`, kept on one line; only the mean if there is no spread."""
    spread = number(std, digits, scale)
    no_spread = spread == "–" or not spread.strip("0.")
    return number(mean, digits, scale) + ("" if is_null(mean) or no_spread else f"\u00a0±\u00a0{spread}")


def seconds(value: Any) -> str:
    """A duration: `4.2 s`, `44 s`, `12 min`, `3.4 h`."""
    if is_null(value):
        return "–"
    value = float(value)
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"


def size(num_bytes: Any) -> str:
    """Bytes with a decimal unit: `595 kB`, `3.2 MB`."""
    if is_null(num_bytes):
        return "–"
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def count(value: Any, noun: str) -> str:
    """`1 trial`, `12 trials`, `3 syntheses`, `4 sparsities`."""
    plural = f"{noun[:-2]}es" if noun.endswith("is") else f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{int(value):,} {noun if int(value) == 1 else plural}"


def more(total: int, shown: int, noun: str) -> str:
    """A sentence with the number of items that are not shown, or nothing."""
    return f" {count(total - shown, noun)} more not shown." if total > shown else ""


def short(value: Any) -> str:
    """A config value as short text."""
    if is_null(value):
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def sparsity(level: Any) -> str:
    """A sparsity as people write it: `0.9`, `0.975`."""
    return f"{float(level):.4g}"


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted field where that is unique, else the whole name."""
    leaves = [name.rpartition(".")[2] for name in fields]
    return {name: leaf if leaves.count(leaf) == 1 else name for name, leaf in zip(fields, leaves, strict=True)}


def settings(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The values of `fields` as text: `bn_weight 0.2, temperature 4`; without sparsity, which has its own column."""
    names = short_names(fields)
    shown = [name for name in fields if name != "pruning.sparsity" and not is_null(row[name])]
    return ", ".join(f"{names[name]} {short(row[name])}" for name in shown)


def base_name(path: Any) -> str:
    """The last part of a path or URI."""
    return "–" if is_null(path) else PurePosixPath(str(path)).name or str(path)


def cut(text: str, length: int) -> str:
    """A text for a figure: one line without control characters, shortened with `…`."""
    text = shown(" ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", text).split()))
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def state_of(statuses: Series) -> str:
    """The number of trials by status: `21 trials: 20 finished, 1 failed.`"""
    counts = statuses.fillna("unknown").value_counts()
    if set(counts.index) == {"finished"}:
        return f"All {count(len(statuses), 'trial')} finished." if len(statuses) > 1 else "One trial, finished."
    return f"{count(len(statuses), 'trial')}: {listed([f'{number:,} {name}' for name, number in counts.items()])}."


def seeds_of(nums: Series) -> str:
    """`3 seeds`, `1 to 3 seeds`."""
    low, high = int(nums.min()), int(nums.max())
    return count(high, "seed") if low == high else f"{low} to {count(high, 'seed')}"


def lead(answers: Frame, fields: Sequence[str]) -> list[tuple[str, str]]:
    """The main result: for each network its label, and a sentence or two on the losses of its best configurations."""
    networks = list(dict.fromkeys(answers["network"]))
    lines = [(name, sentence(answers[answers["network"] == name], fields)) for name in networks[:NUM_NAMED]]
    rest = len(networks) - len(lines)
    if rest:
        lines.append((f"{count(rest, 'more network')}:", "see the table below."))
    return lines


def sentence(rows: Frame, fields: Sequence[str]) -> str:
    """A sentence on one network's loss at each sparsity; it follows the network's label."""
    first = dicts(rows)[0]
    accurate = first["measure"] == "accuracy"
    teacher = f"(teacher {percent(first['at_teacher'])}), " if accurate else ""
    how = (
        "recovered with real images, an upper bound and not data-free,"
        if first["real_data"]
        else "recovered without data,"
    )
    unit = "points of test accuracy" if accurate else "points of agreement with the teacher (no test data was given)"
    losses = [f"{plus_minus(row['lost'], row['lost_std'])} at {sparsity(row['level'])}" for row in dicts(rows)]
    losses[0] = losses[0].replace(" at ", f" {unit} at sparsity ")
    spread = f"mean ± std of {seeds_of(rows['num_seeds'])}" if rows["num_seeds"].max() > 1 else "one seed, no spread"
    text = f"{teacher}{how} loses {listed(losses)} ({spread})."
    if rows["lost_pruned"].notna().all():
        text += f" Pruned and left so, it loses {listed([number(value, 2, 100.0) for value in rows['lost_pruned']])}."
    bounds = rows[rows["bound_lost"].notna()] if "bound_lost" in rows else rows.iloc[:0]
    if len(bounds):
        values = [plus_minus(row["bound_lost"], row["bound_lost_std"]) for row in dicts(bounds)]
        where = "" if len(bounds) == len(rows) else f" at {listed([sparsity(level) for level in bounds['level']])}"
        text += f" With real images in place of synthetic ones, the upper bound, it loses {listed(values)}{where}."
    if len(rows) == 1 and settings(first, fields):
        text += f" Best configuration: {settings(first, fields)}."
    return text


def dicts(frame: Frame) -> list[dict[str, Any]]:
    """The rows of a frame, as dicts by column name."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False, name=None)]


def expected_text(value: Any) -> str:
    """A sweep file's `about.expected`, a sentence or a list of ranges, as one text."""
    parts = value if isinstance(value, list) else [value]
    return "; ".join(range_text(part) if isinstance(part, Mapping) else str(part) for part in parts)


def range_text(expected: Mapping[str, Any]) -> str:
    """One range: `points_lost at pruning.sparsity=0.75: at most 0.5`."""
    where = expected.get("where")
    at = where_text(where) if isinstance(where, Mapping) else ""
    best = ", of the lowest reference_kl" if expected.get("of") == "best" else ""
    return f"{expected.get('metric')}{f' at {at}' if at else ''}{best}: {bounds_text(expected)}"


def where_text(where: Mapping[str, Any]) -> str:
    """Conditions: `pruning.sparsity=0.75, teacher=resnet18`."""
    return ", ".join(f"{name}={short(value)}" for name, value in where.items())


def bounds_text(expected: Mapping[str, Any]) -> str:
    """The bounds of a range: `0.1 to 0.5`, `at most 0.5`."""
    low, high = expected.get("at_least"), expected.get("at_most")
    if low is not None and high is not None:
        return f"{short(low)} to {short(high)}"
    return f"at most {short(high)}" if low is None else f"at least {short(low)}"
