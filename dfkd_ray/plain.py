"""Plain data, i.e. JSON types: mappings with text keys, lists, text, numbers, booleans, null. Checks and display.

Data from the user is checked to be plain before it is used. Error messages show it shortened.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from dfkd_ray.masking import with_slashes
from dfkd_ray.text import shortened
from dfkd_ray.text import shown as printable

MOST_DEPTH = 24  # nesting of lists and mappings
MOST_SIGNS = 4096  # characters of a text: a name, a path, a URI
LARGEST = 2**63 - 1  # largest integer of a table's columns
SHOWN, SHOWN_PATH = 80, 120  # characters of a value and of a path in an error message


def given(value: Any, most: int = SHOWN) -> str:
    """A value of any type and size for an error message: its Python form on one line, shortened."""
    return cut(printable(written(value, 3)), most)


def named(path: object) -> str:
    """A path or a name for an error message."""
    return cut(printable(path), SHOWN_PATH)


def cut(text: str, most: int) -> str:
    """A text shortened in the middle. Secrets of a URI are removed first: half a secret would not be recognised."""
    text = with_slashes(text)
    if len(text) > most and "://" in text:
        text = re.sub(r"://[^/]*@", "://***@", text.partition("?")[0])
    return shortened(text, most)


def written(value: Any, depth: int) -> str:
    """A value in its Python form; large parts are abbreviated."""
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SIGNS else value[:MOST_SIGNS])
    if isinstance(value, int) and not isinstance(value, bool):
        # Python refuses to print integers with more than 4,300 digits.
        return str(value) if abs(value) < 10**30 else f"a number of {math.ceil(value.bit_length() * 0.30103)} digits"
    if isinstance(value, Mapping):
        if depth == 0 and value:
            return "{…}"
        inner = [f"{written(k, 0)}: {written(v, depth - 1)}" for k, v in list(value.items())[:5]]
        return "{" + ", ".join([*inner, *["…"][: len(value) > 5]]) + "}"
    if isinstance(value, list | tuple):
        if depth == 0 and value:
            return "[…]"
        return "[" + ", ".join([*(written(v, depth - 1) for v in value[:5]), *["…"][: len(value) > 5]]) + "]"
    return repr(value)


def text_fault(text: str, most: int = MOST_SIGNS) -> str | None:
    """Why a text cannot be written to a table or used as a name; None if it can."""
    if len(text) > most:
        return f"a text of {len(text):,} characters; at most {most:,} are taken"
    if "\0" in text:
        return "a text with a NUL character"
    return "a text with half a character (a lone surrogate)" if any("\ud800" <= s <= "\udfff" for s in text) else None


def fault(data: Any, most: int, most_signs: int = MOST_SIGNS) -> str | None:
    """Why data is not plain, too deep or has more than `most` values, with the position; None if it is valid."""
    todo, num = [(data, "", 0)], 0
    while todo:
        value, place, depth = todo.pop()
        num += 1
        if num > most:
            return f"more than {most:,} values"
        where = f"{shortened(printable(place), SHOWN)}: " if place else ""
        if isinstance(value, Mapping | list | tuple):
            if depth == MOST_DEPTH:
                return f"{where}nested deeper than {MOST_DEPTH} levels"
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, inner in items:
                if isinstance(value, Mapping) and not isinstance(key, str):
                    return f"{where}{given(key)} is no name; write it in quotes"
                if isinstance(key, str) and (wrong := text_fault(key)):
                    return f"{where}{wrong} in place of a name"
                todo.append((inner, f"{place}.{key}" if place else str(key), depth + 1))
        elif wrong := scalar_fault(value, most_signs):
            return where + wrong
    return None


def scalar_fault(value: Any, most_signs: int) -> str | None:
    """Why a single value is not plain; None if it is."""
    if isinstance(value, str):
        return text_fault(value, most_signs)
    if isinstance(value, int):
        return None if -LARGEST <= value <= LARGEST else f"{given(value)} does not fit into 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is not finite"
    return None if value is None else f"expected a number, text, true, false or null, got {type(value).__name__}"


def alike(one: Any, other: Any) -> bool:
    """Whether two plain values are equal. 1 equals 1.0, but not true."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def with_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `data` with dotted `overrides` applied; unchanged parts are shared.

    `ValueError` if a parent in a path is not a mapping.
    """
    result = dict(data)
    for name, value in overrides.items():
        *parents, leaf = name.split(".")
        above = result
        for parent in parents:
            inner = above.get(parent)
            if inner is not None and not isinstance(inner, dict | Mapping):
                raise ValueError(f"{named(name)}: {given(parent)} is a plain value, it has no fields")
            above[parent] = dict(inner or {})  # absent, or an empty section of a file
            above = above[parent]
        above[leaf] = value
    return result


def value_at(data: Any, name: str) -> Any:
    """The value of a dotted name in nested data; None if there is none."""
    for part in name.split("."):
        data = data.get(part) if isinstance(data, dict | Mapping) else None  # dict first: that check is much faster
    return data
