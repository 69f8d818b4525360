"""Markdown from text of unknown origin: names become code spans, in which nothing is a link, an image or HTML."""

import re
from collections.abc import Sequence

from dfkd_ray.text import one_line

MOST = 120  # characters of a foreign text


def code(text: object, most: int = MOST) -> str:
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


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"* {line}" for line in lines)


def block(lines: Sequence[str], language: str = "python") -> str:
    """A block of code. No line may begin with a fence: foreign texts in it are literals."""
    assert not any(line.lstrip().startswith("```") for line in lines)
    return "\n".join([f"```{language}", *lines, "```"])
