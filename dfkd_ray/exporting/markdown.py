"""Markdown from text of unknown origin: names become code spans, in which nothing is a link, an image or HTML."""

from collections.abc import Sequence

from dfkd_ray.text import code, table

__all__ = ["block", "bullets", "code", "table"]


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"* {line}" for line in lines)


def block(lines: Sequence[str], language: str = "python") -> str:
    """A block of code. No line may begin with a fence: foreign texts in it are literals."""
    assert not any(line.lstrip().startswith("```") for line in lines)
    return "\n".join([f"```{language}", *lines, "```"])
