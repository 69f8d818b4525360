"""What the tests do with folders of any file system."""

import hashlib
import os
import time
from pathlib import Path

from dfkd_ray.storage import Folder


def remove_everything(folder: Folder) -> None:
    """Remove a folder and all in it; the program itself has no such thing."""
    for inner in folder.folders():
        remove_everything(inner)
    folder.clear(lambda _name: True)


def content(folder: Folder, name: str) -> bytes:
    """What a file holds that is there."""
    data = folder.read(name)
    assert data is not None, f"{folder} has no {name}"
    return data


def put_back(path: Path, seconds: float) -> None:
    """Let a file have been used so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every plain file below a folder, by its relative path; of a link, where it leads."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
