"""The git commit of this package: from git in a checkout, from a file in an installed wheel.

It uses only the standard library: the build hook (`.ci/embed_commit.py`) runs this file by itself.
"""

import subprocess
from pathlib import Path

FILE = "_commit.txt"  # in wheels and source archives, beside this module; never in a checkout


def of_package(folder: Path | None = None) -> str | None:
    """The commit of the package in `folder` (default: this one), with `+` if it had changes; None if unknown."""
    folder = Path(__file__).resolve().parent if folder is None else folder
    if (folder.parent / ".git").exists():
        return of_checkout(folder)
    try:
        return (folder / FILE).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def of_checkout(folder: Path) -> str | None:
    """The commit that a checkout is at, `+` where `folder` in it has changes; None without git, or before a commit."""

    def git(*words: str) -> str:
        words = ("git", "-C", str(folder), *words)
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None
