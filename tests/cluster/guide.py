"""What tests run or check of the guide to a cluster: its blocks, and the files that stand beside it."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "dfkd_ray" / "fleet"
TEXT = (FOLDER / "CLUSTER.md").read_text(encoding="utf-8")
HOSTS = (FOLDER / "hosts.yaml").read_text(encoding="utf-8")
RAYJOB = (FOLDER / "rayjob.yaml").read_text(encoding="utf-8")


def block(name: str) -> str:
    """A fenced block of the guide by the comment above it."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)\n```", TEXT, re.S)
    assert found, f"CLUSTER.md has no block {name!r}"
    return found[1]
