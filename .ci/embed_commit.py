"""Build hook: a wheel, and a source archive, knows the commit it was built from, where there is one.

Results say which commit made them; a wheel has no git to ask. The file goes into what is built, not into the source
tree. A source archive holds it too, so that a wheel built from one knows it as well.
"""

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EmbedCommit(BuildHookInterface):
    """Adds `dfkd_ray/_commit.txt`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the build; an editable install stays a checkout, which is asked each time."""
        folder = Path(self.root) / "dfkd_ray"
        commits = runpy.run_path(str(folder / "commit.py"))
        if version == "editable" or (folder / commits["FILE"]).exists():
            return
        commit = commits["of_package"](folder)
        if commit:
            self.scratch = tempfile.TemporaryDirectory(prefix="dfkd_ray-commit-")
            path = Path(self.scratch.name) / commits["FILE"]
            path.write_text(commit + "\n", encoding="utf-8")
            build_data["force_include"][str(path)] = f"dfkd_ray/{commits['FILE']}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """After it."""
        if hasattr(self, "scratch"):
            self.scratch.cleanup()
