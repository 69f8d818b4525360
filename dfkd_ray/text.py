"""Makes foreign text (names, error messages, paths) safe to print on a terminal, and in Markdown."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_MESSAGE = 280  # characters of an error's line
MOST_CODE = 120  # characters of a foreign text in Markdown
# Joiners, which some scripts and emoji need, are the only invisible characters that are kept.
JOINERS = "\u200c\u200d"
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidirectional marks are such), lone surrogates, line ends


def shown(text: object, keep: str = "") -> str:
    """A text with control, bidirectional and other invisible characters replaced by visible escapes (`\\x1b`, `\\n`,
    `\\u202e`), except those in `keep`. It is one line unless `keep` has the newline.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(sign if sign in keep or not is_hidden(sign) else escaped(sign) for sign in plain)


def is_hidden(sign: str) -> bool:
    """Whether a character is invisible or a control character."""
    return unicodedata.category(sign) in HIDDEN and sign not in JOINERS


def escaped(sign: str) -> str:
    """A character as a Python escape."""
    return sign.encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int) -> str:
    """A text cut to at most `most` characters by leaving out its middle."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def last_parts(paths: Iterable[str]) -> dict[str, str]:
    """Each path or URI by its last part; those that share it by as many more as tell them apart."""
    parts = {path: [part.rpartition("@")[2] for part in path.split("/") if part] or [path] for path in paths}
    called: dict[str, str] = {}
    for num in range(1, 1 + max(map(len, parts.values()), default=0)):
        ends = {path: "/".join(own[-num:]) for path, own in parts.items() if path not in called}
        seen = Counter(ends.values())
        called |= {path: end for path, end in ends.items() if seen[end] == 1}
    return {path: called.get(path, path) for path in parts}


def one_line(text: object, most: int = MAX_MESSAGE) -> str:
    """Foreign text for an error: one line of at most `most` characters, without terminal control characters."""
    return shortened(shown(" ".join(str(text)[: 8 * most].split())), most)


def code(text: object, most: int = MOST_CODE) -> str:
    """A foreign text as a code span in one line, shortened.

    CommonMark 0.31, section 6.1: a span ends at a run of as many backticks as it began with, so it begins with more
    than any run in the text. Invisible characters are escapes.
    """
    line = one_line(text, most).strip() or "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}"


def cell(text: str) -> str:
    """Markdown in a cell of a table: a bar ends a cell, in a code span too, unless it is escaped."""
    return text.replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def number_in(row: Mapping[str, Any], name: str) -> float | None:
    """The number in a row's cell; None if it is empty, or not there."""
    value = row.get(name)
    return None if value is None or is_null(value) else float(value)


def is_null(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN, or pandas' NA and NaT."""
    if value is None:
        return True
    if isinstance(value, str):
        return False
    try:
        return bool(value != value)
    except TypeError:  # comparing pandas' NA gives NA, which has no truth value
        return True
    except ValueError:  # an array
        return False
