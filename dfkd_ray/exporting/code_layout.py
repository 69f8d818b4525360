"""Expressions of Python as text: literals that cannot become code, and calls laid out in lines, as formatters do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

WIDTH, STEP = 120, 4  # columns of a line, and of an indentation
DTYPES = {value: f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Call:
    """Code with parts in brackets: `head` ends in the opening bracket, `tail` begins with the closing one.

    `parts` are pairs of what stands before a part (`name=`) and the part.
    """

    head: str
    parts: Sequence[tuple[str, "Code"]]
    tail: str = ")"


Code: TypeAlias = str | Call


def call(head: str, positional: Sequence[Code], named: Mapping[str, Code]) -> Call:
    """A function's call."""
    return Call(f"{head}(", [*(("", part) for part in positional), *((f"{name}=", named[name]) for name in named)])


def flat(code: Code) -> str:
    """Code in one line."""
    if isinstance(code, str):
        return code
    comma = "," if code.head.endswith("(") and code.head.strip() == "(" and len(code.parts) == 1 else ""
    return f"{code.head}{', '.join(before + flat(part) for before, part in code.parts)}{comma}{code.tail}"


def laid_out(before: str, code: Code, indent: int = 0, after: str = "") -> str:
    """A statement: in one line if that fits, else the parts of its outermost brackets in lines of their own."""
    space, line = " " * indent, before + flat(code) + after
    if isinstance(code, str) or not code.parts or len(space + line) <= WIDTH:
        return space + line
    inner = ", ".join(before + flat(part) for before, part in code.parts)
    is_tuple = code.head.strip() == "("  # its lines keep their comma
    if indent + STEP + len(inner) <= WIDTH and not is_tuple and not code.head.endswith(("[", "{")):
        rows = [" " * (indent + STEP) + inner]
    else:
        rows = [laid_out(name, part, indent + STEP, ",") for name, part in code.parts]
    return "\n".join([f"{space}{before}{code.head}", *rows, f"{space}{code.tail}{after}"])


def literal(value: Any) -> Code | None:
    """A plain value as code that gives an equal one; None if it is none of PyTorch's or Python's plain values."""
    if isinstance(value, str):
        return text(str(value))
    if isinstance(value, bool | int) or value is None or value is Ellipsis:
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, torch.dtype):
        return DTYPES[value]
    if isinstance(value, torch.device):
        return f"torch.device({text(str(value))})"
    if isinstance(value, torch.memory_format):
        return str(value)
    return None


def text(value: str) -> str:
    """A string's literal in ASCII, in double quotes where these need no escape."""
    plain = ascii(value)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in value else plain


def sequence(parts: Sequence[Code], is_tuple: bool) -> Call:
    """A tuple or a list."""
    return Call("(" if is_tuple else "[", [("", part) for part in parts], ")" if is_tuple else "]")
