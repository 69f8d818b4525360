"""Makes foreign text (names, error messages, paths) safe to print on a terminal."""

import unicodedata
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE = 280  # characters of an error's line
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


def one_line(text: object, most: int = MAX_MESSAGE) -> str:
    """Foreign text for an error: one line of at most `most` characters, without terminal control characters."""
    return shortened(shown(" ".join(str(text)[: 8 * most].split())), most)


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
