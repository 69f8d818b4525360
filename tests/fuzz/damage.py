"""What goes wrong with values, nested data and bytes: the parts that the generators are made of."""

import copy
import random
from typing import Any

HUGE = 10**400
NUMBERS = [-1, 0, 2, 3, 2**31, 2**63 - 1, 2**63, 2**64, 10**20, HUGE, -(2**63) - 1, 0.1, -0.5, 1e-320, 1e308, 1e39]
NUMBERS += [float("nan"), float("inf"), float("-inf"), True, False]
PLACES = ["", " ", ".", "..", "/", "~", "~nobody", "../..", "/dev/zero", "/dev/null", "/proc/self/mem", "notes.txt"]
PLACES += ["s3://", "s3:///x", "ftp://127.0.0.1:9/x", "gs://", "http://127.0.0.1:9/x", "fsspec+nothing://x", "://"]
MARKS = ["[/b]", "[red]x", "\x1b[31mred", "\x1b]0;title\x07", "a\u202eb", "\u2066x", "a\rb", "a\nb", "\x85", "\u2028"]
MARKS += ["=1+1", "@SUM(A1)", "{0}", "%s", "$(id)", "`id`", "'", '"', "\\", ":smile:", "a\tb", "\ufeff", "\ufffe"]
NAMES = ["réseau", "テスト", "сеть", "شبكة", "🙂", "a" * 300, "x" * 100_000, "-x", "--help", "a/b/c", "con", "nul"]
TEXTS = [*PLACES, *MARKS, *NAMES, "1:30", "2001-01-01", "0x10", "1_000", "1e5", "null", "yes", "nan", "None", "[1, 2"]
SHAPES: list[Any] = [None, [], {}, [[]], [None], {"a": {}}, {"": ""}, [1, "a", None], {"method": "magic"}, [[1, 2]] * 3]


def deep(depth: int, kind: type = list) -> Any:
    """A value nested that deep."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def scalar(rng: random.Random) -> Any:
    """A number or text that somebody has trouble with."""
    return rng.choice(rng.choice([NUMBERS, TEXTS, MARKS]))


def anything(rng: random.Random) -> Any:
    """The same, or a list or a mapping where none belongs."""
    if rng.random() < 0.3:
        return copy.deepcopy(rng.choice([*SHAPES, deep(60), deep(60, dict), [scalar(rng)] * 3]))
    return scalar(rng)


def text(rng: random.Random) -> str:
    """A text for a command line: any but NUL."""
    value = rng.choice([scalar(rng), rng.choice(TEXTS)])
    return str(value if abs(value) < 1e300 else "1" + "0" * 400) if isinstance(value, int | float) else value


def spots(data: Any, below: tuple = ()) -> list[tuple]:
    """The way to every value in nested data."""
    found = [below] if below else []
    if isinstance(data, dict | list):
        keys = list(data) if isinstance(data, dict) else range(len(data))
        for key in keys:
            found += spots(data[key], (*below, key))
    return found


def changed(rng: random.Random, data: Any, times: int = 1) -> Any:
    """A copy of nested data in which something was replaced, left out, added, or called by another name."""
    data = copy.deepcopy(data)
    for _ in range(times):
        way: tuple[Any, ...] = rng.choice(spots(data) or [()])
        if not way:
            return anything(rng)
        node = data
        for key in way[:-1]:
            node = node[key]
        leaf, what = way[-1], rng.choice(["replace"] * 6 + ["remove", "add", "rename", "wrap"])
        if what == "replace":
            node[leaf] = anything(rng)
        elif what == "remove":
            del node[leaf]
        elif what == "wrap":
            node[leaf] = rng.choice([[node[leaf]], {"a": node[leaf]}, str(node[leaf])])
        elif isinstance(node, dict):
            value = node.pop(leaf) if what == "rename" else anything(rng)
            node[rng.choice([f"{leaf}s", str(leaf).upper(), text(rng)[:50], ""])] = value
        else:
            node.append(anything(rng))
    return data


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are not quite those: flipped, cut, doubled, zeroed, or others altogether."""
    what = rng.choice(["flip"] * 4 + ["cut"] * 3 + ["zero", "grow", "empty", "noise", "text", "head"])
    if what == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 40])):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if what == "head":  # where files say what they are
        return rng.randbytes(rng.choice([1, 4, 16])) + data[rng.choice([1, 4, 16]) :]
    at = rng.randrange(len(data) + 1)
    made = {
        "cut": data[:at],
        "zero": data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :],
        "grow": data + rng.randbytes(100),
        "empty": b"",
        "noise": rng.randbytes(200),
        "text": b"<html><body>404 Not Found</body></html>",
    }
    return made[what]
