"""Text of others on its way to a person: names, reasons and paths hold whatever somebody wrote into them."""

import unicodedata
from typing import Any

MOST_SIGNS = 280  # of an error's line
# Joiners, of which scripts and emoji are made, are the only invisible signs that stay as they are.
JOINERS = "\u200c\u200d"
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidirectional marks are such), lone surrogates, line ends


def shown(text: object, keep: str = "") -> str:
    """A text in which nothing acts on a terminal or hides: control, bidirectional and other invisible signs become
    visible escapes (`\\x1b`, `\\n`, `\\u202e`), but for those in `keep`. One line, unless `keep` has the newline.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(sign if sign in keep or not is_hidden(sign) else escaped(sign) for sign in plain)


def is_hidden(sign: str) -> bool:
    """Whether a character is none that is seen as itself."""
    return unicodedata.category(sign) in HIDDEN and sign not in JOINERS


def escaped(sign: str) -> str:
    """A character as Python writes it in a string."""
    return sign.encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int) -> str:
    """A text of any length in at most so many characters, its middle left out."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def one_line(text: object, most: int = MOST_SIGNS) -> str:
    """A text for an error: one line of at most `most` characters, in which nothing acts on a terminal."""
    return shortened(shown(" ".join(str(text)[: 8 * most].split())), most)


def is_null(value: Any) -> bool:
    """Whether a cell of a table holds nothing: None, NaN, or pandas' NA and NaT."""
    if value is None:
        return True
    if isinstance(value, str):
        return False
    try:
        return bool(value != value)
    except TypeError:  # pandas' NA is neither equal to itself nor not
        return True
    except ValueError:  # an array
        return False
