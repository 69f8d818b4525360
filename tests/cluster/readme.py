"""Blocks of the README that tests run or check."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """A fenced block by the comment above it."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)\n```", TEXT, re.S)
    assert found, f"README.md has no block {name!r}"
    return found[1]
