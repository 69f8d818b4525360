"""Choosing among rows: simple comparisons, sorting, seeds folded into mean and standard deviation. Pure pandas."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dfkd_ray.config import LEFT_OUT, follows
from dfkd_ray.results.schemas import BEST_FIRST, METRICS, REFERENCE_KIND, SEEDS, WRITTEN_AT, close_to, schema
from dfkd_ray.text import shortened

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
CONDITION = re.compile(r"\s*([\w.]+)\s*(==|!=|<=|>=|=|<|>)\s*(.*?)\s*")
TRUTHS = {"true": True, "false": False}
NUM_SEEDS = "num_seeds"
ALGORITHMS = ("trial_version", "synthesis_version")
TEST_SET = "test_sha256"
MADE_OF = ("teacher_architecture", "teacher_hash", "real_data", *ALGORITHMS)
# Columns that may explain different numbers of equal trials, other than config fields.
MADE_BY = {
    "trial_version": "versions of the trial's algorithms",
    "synthesis_version": "versions of the synthesis algorithms",
    "package_version": "versions of dfkd_ray",
    "torch_version": "versions of torch",
    "numerics": "numerics classes",
}
MIXED_SINCE = 3  # trial_version
NUM_MIXED = 3  # values of one kind that are named
STD = "_std"


def column_of(name: str, columns: Sequence[str]) -> str:
    """The column with this name or with this last part: `sparsity` gives `pruning.sparsity`.

    Settings of the reference set need their full names. `ValueError` if there is no such column, or more than one.
    """
    if name in columns:
        return name
    own = [column for column in columns if not column.startswith("reference.")]
    same_leaf = [column for column in own if column.rpartition(".")[2] == name]
    if len(same_leaf) == 1:
        return same_leaf[0]
    if same_leaf:
        raise ValueError(f"{name!r} is the end of several columns; expected one of {', '.join(same_leaf)}")
    raise ValueError(f"{name!r}: no such column{close_to(name, columns)}")


def matching(frame: pd.DataFrame, condition: str) -> pd.Series:
    """A mask of the rows that meet `NAME OP VALUE`. = and != accept `null`; nulls meet no order comparison."""
    match = CONDITION.fullmatch(condition)
    if not match or not match[3]:
        raise ValueError(f"{condition!r}: expected NAME, one of {' '.join(COMPARISONS)}, VALUE, as in 'sparsity>=0.75'")
    name, sign, text = match.groups()
    name = column_of(name, list(frame.columns))
    column: Any = frame[name]
    equality = sign in ("=", "==", "!=")
    if text == "null":
        if not equality:
            raise ValueError(f"{condition!r}: null has no order; expected = or !=")
        return column.notna() if sign == "!=" else column.isna()
    if name == "pruning.structure":  # rows of trials without channels leave it out
        column = column.fillna(LEFT_OUT[name])
    value: Any = text
    there = column.dropna()
    if len(there) and all(type(one) in (bool, np.bool_) for one in there):
        if text not in TRUTHS or not equality:
            raise ValueError(f"{condition!r}: {name} is true or false; expected = or != and one of the two")
        value = TRUTHS[text]
    elif pd.api.types.is_numeric_dtype(column):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):  # nothing is equal to it, above or below it
            raise ValueError(f"{condition!r}: {name} is a number, {text!r} is none")
    elif not equality:
        raise ValueError(f"{condition!r}: {name} is text; expected = or !=")
    met = COMPARISONS[sign](there, value).reindex(column.index, fill_value=sign == "!=")
    return met.astype(bool)


def matching_all(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.Series:
    """A mask of the rows that have, in each of these columns, the value that is given, or one of several."""
    mask = pd.Series(True, frame.index)
    for name, wanted in where.items():
        found = pd.Series(False, frame.index)
        for value in wanted if isinstance(wanted, list) else [wanted]:
            found |= matching(frame, f"{name}={written(value)}")
        mask &= found
    return mask


def written(value: Any) -> str:
    """A plain value as the VALUE of a condition."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, float) else str(value)


def select(
    frame: pd.DataFrame, where: Sequence[str] = (), sort: Sequence[str] = (), limit: int | None = None
) -> pd.DataFrame:
    """The rows that meet every condition, sorted by columns (`-NAME`: largest first; nulls last), the first `limit`."""
    for condition in where:
        frame = frame.loc[matching(frame, condition)]
    if sort:
        names = [column_of(name.removeprefix("-"), list(frame.columns)) for name in sort]
        rising = [not name.startswith("-") for name in sort]
        frame = frame.sort_values(names, ascending=rising, kind="stable", na_position="last")
    return frame.head(limit) if limit is not None else frame


def config_fields() -> list[str]:
    """The columns of `trials` that are config fields."""
    return [name for name in schema("trials").names if name not in METRICS]


def num_values(frame: Any, name: str) -> int:
    """The number of distinct values of a column; null counts as a value."""
    return frame[name].nunique(dropna=False)


def varied_fields(trials: pd.DataFrame) -> list[str]:
    """The config fields that differ between trials of the same synthesis method, and the method itself.

    Fields derived from others are left out.
    """
    groups = [group for _, group in trials.groupby("synthesis.method", dropna=False)]
    fields = [name for name in trials.columns if "." in name and not name.startswith("reference.")]
    fields = [name for name in fields if not follows(name)]
    return [
        name for name in fields if name == "synthesis.method" or any(num_values(group, name) > 1 for group in groups)
    ]


def fixed_columns() -> list[str]:
    """The columns that are equal in trials that differ in seeds only."""
    return [*MADE_OF, *(name for name in config_fields() if name not in SEEDS)]


def seed_groups(trials: pd.DataFrame, fixed: Sequence[str] | None = None) -> pd.Series:
    """A number for each trial, equal for trials that differ in seeds only. Null is a value like any other.

    `fixed`: the columns that are equal in these; default: `fixed_columns`.
    """
    fixed = fixed_columns() if fixed is None else fixed
    varied = [name for name in fixed if num_values(trials, name) > 1]  # few; the others cannot tell apart
    if not varied:
        return pd.Series(0, trials.index)
    return trials.groupby(varied, dropna=False, sort=False).ngroup()


def fold_seeds(trials: pd.DataFrame) -> pd.DataFrame:
    """Finished trials, grouped over seeds: one row per group with the mean of each number and its std as `<name>_std`.

    Trials of several test sets are in several groups. The standard deviation is the sample's (n - 1), null for one
    seed. The order is `BEST_FIRST`.
    """
    trials = trials.loc[trials["status"] == "finished"]
    numeric = (pa.float64(), pa.int64())
    known = {WRITTEN_AT, *ALGORITHMS}
    numbers = [name for name, (kind, _, _) in METRICS.items() if kind in numeric and name not in known]
    fixed = [*fixed_columns(), TEST_SET]
    group = seed_groups(trials, fixed)
    groups: Any = trials.groupby(group.to_numpy(), sort=False)
    spread = groups[numbers].std().add_suffix(STD)
    folded = pd.concat(
        [groups[fixed].head(1).set_index(group.drop_duplicates()), groups[numbers].mean(), spread], axis=1
    )
    folded[NUM_SEEDS] = groups.size()
    order = [column for name in numbers for column in (name, name + STD)]
    folded: Any = folded[[*MADE_OF, NUM_SEEDS, *order, *fixed[len(MADE_OF) :]]]
    return folded.sort_values(list(BEST_FIRST), ascending=list(BEST_FIRST.values())).reset_index(drop=True)


def mixtures(frame: pd.DataFrame) -> list[str]:
    """The provenance columns with several values in a table: versions of algorithms and packages, numerics classes.

    One phrase each, with values and counts: `2 versions of torch (2.6.0: 3 rows, 2.7.1: 5 rows)`; usually empty.
    """
    found = []
    for name, what in MADE_BY.items():
        if name not in frame:
            continue
        values = frame[name].value_counts(dropna=False)
        if len(values) < 2:
            continue
        shown = [f"{value_shown(value)}: {num} row{'' if num == 1 else 's'}" for value, num in values.items()]
        more = [f"and {len(shown) - NUM_MIXED} more"] if len(shown) > NUM_MIXED else []
        found.append(f"{len(values)} {what} ({', '.join([*shown[:NUM_MIXED], *more])})")
    return found


def mixed(frame: pd.DataFrame) -> str | None:
    """`mixtures` as one line of text, and whether accuracies, KL and agreement can be compared; None if all can be.

    On mixtures of one method's images the KL does not choose between methods: of a ResNet-20 at sparsity 0.98, students
    of `adi` are 2.1 points better than those of `deepinversion`, of which the reference images are, and 0.025 nats
    farther from the teacher on them. Mixed with shapes, it does.
    """
    found, sets = mixtures(frame), reference_sets(frame)
    says = [f"rows that were made differently: {'; '.join(found)}; their numbers may differ for it"] if found else []
    if num := num_tested_twice(frame):
        whose = "one teacher" if num == 1 else f"{num} teachers"
        says.append(f"students of {whose} were measured on several test sets: their accuracies cannot be compared")
    if len(sets) > 1:
        numbers = ", ".join(f"{what}: {num} row{'' if num == 1 else 's'}" for what, num in sets.items())
        says.append(f"KL and agreement on two kinds of reference images cannot be compared ({numbers})")
    if len(methods := inverting_methods(frame)) > 1:
        named = ", ".join(methods)
        says.append(
            f"several synthesis methods ({named}): KL and agreement favour that of the reference images; "
            "reference.mixed_with=shapes is fairer"
        )
    return "; ".join(says) or None


def num_tested_twice(frame: pd.DataFrame) -> int:
    """The number of teachers whose students were measured on more than one test set."""
    if not {"teacher_hash", TEST_SET} <= set(frame.columns):
        return 0
    num_sets: Any = frame.groupby("teacher_hash", dropna=False)[TEST_SET].nunique()
    return int((num_sets > 1).sum())


def inverting_methods(frame: pd.DataFrame) -> list[str]:
    """The synthesis methods of the students that have a KL on one method's images, but for baselines and bound."""
    if not {"synthesis.method", "reference_kl", "reference.mixed_with"} <= set(frame.columns):
        return []
    favours = frame["reference_kl"].notna() & (frame["reference.mixed_with"] != "shapes")
    found = frame.loc[favours, "synthesis.method"].dropna().unique()
    return sorted(str(name) for name in found if name not in ("noise", "shapes", "real"))


def reference_sets(frame: pd.DataFrame) -> dict[str, int]:
    """Number of rows by their reference images: plain ones until version 3, or where asked for; mixed ones."""
    if not REFERENCE_KIND.keys() <= set(frame.columns):
        return {}
    measured: Any = frame.loc[frame["status"] != "failed"] if "status" in frame else frame
    is_new = measured["trial_version"].fillna(0) >= MIXED_SINCE
    is_mixed: Any = is_new & measured["reference.mixed"].map(lambda value: not pd.isna(value) and bool(value))
    with_shapes = is_mixed & (measured["reference.mixed_with"] == "shapes")
    masks = {"mixed": is_mixed & ~with_shapes, "mixed with shapes": with_shapes, "plain": ~is_mixed}
    return {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}


def value_shown(value: Any) -> str:
    """A version or numerics class for a message."""
    if pd.isna(value):
        return "unknown"
    return str(int(value)) if isinstance(value, int | float) else shortened(str(value), 60)


def with_whole_numbers(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """Integer columns as integers again: pandas reads those with nulls as floats."""
    kinds = schema(table)
    whole = [name for name in frame.columns if name in kinds.names and kinds.field(name).type == pa.int64()]
    floats = [name for name in whole if frame[name].dtype.kind == "f"]
    # Beyond 2^53 a float is no exact integer any more, and from 2^63 on it fits into none.
    small = [name for name in floats if not (np.abs(frame[name].to_numpy()) > 2**53).any()]
    return frame.astype(dict.fromkeys(small, "Int64"))
