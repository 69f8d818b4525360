"""Checks rows before they are written: values that the table's columns cannot hold are replaced or left out.

A row of `trials` that does not fit becomes a failed row that names the column, so that writing it never raises and the
reason is visible.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dfkd_ray.results import schemas
from dfkd_ray.text import shortened

log = logging.getLogger(__name__)


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `trials` that fits the table: the row itself, or a failed row with the reason.

    Numbers that are not finite become null in a failed or stopped row. A finished row with such numbers becomes failed.
    """
    if row.get("status") != "finished":
        row = {name: None if is_not_finite(value) else value for name, value in row.items()}
    fits, problems = fitting("trials", row)
    if not problems:
        return fits
    schema = schemas.schema("trials")
    for name in problems:
        if isinstance(row.get(name), str) and name in schema.names and schema.field(name).type == pa.string():
            fits[name] = row[name].encode("utf-8", "backslashreplace").decode()
    if row.get("status") == "failed":
        return fits
    return fits | {"status": "failed", "reason": reason_of(problems)}


def unfit(row: Mapping[str, Any]) -> str | None:
    """Why a row of `trials` cannot be written, as the reason of a failed row; None if it can."""
    problems = fitting("trials", row)[1]
    return reason_of(problems) if problems else None


def reason_of(problems: Mapping[str, str]) -> str:
    """The reason for a row that does not fit: its first bad column, and the number of others."""
    (name, why), *others = problems.items()
    more = f" (and {len(others)} more)" if others else ""
    return f"the row cannot be written: column {shortened(name, 80)}: {why}{more}"


def writable(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `epochs` or `synthesis` without the values that the table cannot hold; they are logged."""
    fits, problems = fitting(table, row)
    if problems:
        log.warning("%s: left out: %s", table, "; ".join(f"column {name}: {why}" for name, why in problems.items()))
    return fits


def fitting(table: str, row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a row that fit its table, as plain Python values; and column → problem for the others."""
    schema = schemas.schema(table)
    fits, problems = {}, {}
    for name, value in row.items():
        plain = value.item() if isinstance(value, np.generic) else value
        problem = "the table has no such column"
        if name in schema.names:
            problem = problem_of(plain, schema.field(name).type)
        if problem is None:
            fits[name] = plain
        else:
            problems[str(name)] = problem
    return fits, problems


def problem_of(value: Any, kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold a value, or None."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == pa.string():
        return text_problem(value)
    if kind == pa.bool_():
        return None if isinstance(value, bool) else f"expected true or false, got {shown(value)}"
    if not is_number:
        return f"expected a number, got {shown(value)}"
    if is_not_finite(value):
        return f"{value} is no finite number"
    if kind == pa.int64():
        if value != int(value):
            return f"expected a whole number, got {shown(value)}"
        return None if -(2**63) <= value < 2**63 else f"{shown(value)} is beyond 64 bits"
    try:
        float(value)
    except OverflowError:
        return f"{shown(value)} is beyond what a float holds"
    return None


def text_problem(value: Any) -> str | None:
    """Why a column of text cannot hold a value, or None."""
    if not isinstance(value, str):
        return f"expected text, got {shown(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair, which is no text"
    return None


def is_not_finite(value: Any) -> bool:
    """Whether a value is a NaN or an infinity."""
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def shown(value: Any) -> str:
    """A value of any size, shortened for a message."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = shortened(repr(value), 60)
    return text.encode("utf-8", "backslashreplace").decode()
