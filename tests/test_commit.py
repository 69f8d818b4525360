"""Rows say which commit made them: asked of git in a checkout, read from the wheel elsewhere."""

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from dfkd_ray import commit

ROOT = Path(__file__).parents[1]
NAME = f"dfkd_ray/{commit.FILE}"


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkout of what decides how this project is built, with little of the package in it."""
    root = tmp_path / "source"
    kept = ["pyproject.toml", "README.md", "LICENSE", ".gitignore", ".ci/embed_commit.py"]
    kept += ["dfkd_ray/__init__.py", "dfkd_ray/commit.py", "dfkd_ray/bundled/fashion_mnist/LICENSE"]
    for name in kept:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def built(builder, root: Path, version: str = "standard") -> Path:
    (path,) = builder(str(root)).build(directory=str(root.parent / "dist"), versions=[version])
    return Path(path)


def embedded(wheel: Path) -> str | None:
    """The content of the file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        assert "dfkd_ray/__init__.py" in archive.namelist()
        return archive.read(NAME).decode() if NAME in archive.namelist() else None


def test_a_wheel_holds_the_commit_it_was_built_from_and_says_whether_it_had_changes(source):
    head = git(source, "rev-parse", "HEAD")
    assert embedded(built(WheelBuilder, source)) == head + "\n"
    with (source / "dfkd_ray" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    assert embedded(built(WheelBuilder, source)) == head + "+\n"
    assert git(source, "status", "--porcelain") == "M dfkd_ray/__init__.py", "nothing is left in the source tree"


def test_an_installed_wheel_tells_its_commit_and_a_checkout_asks_git(source, tmp_path):
    head = git(source, "rev-parse", "HEAD")
    with zipfile.ZipFile(built(WheelBuilder, source)) as archive:
        archive.extractall(tmp_path / "site-packages")
    assert commit.of_package(tmp_path / "site-packages" / "dfkd_ray") == head
    (source / "dfkd_ray" / commit.FILE).write_text("another\n")
    assert commit.of_package(source / "dfkd_ray") == head + "+"


def test_an_editable_install_has_no_file_that_would_grow_old(source):
    hook = WheelBuilder(str(source)).get_build_hooks(str(source.parent))["custom"]
    for version, expected in (("editable", []), ("standard", [NAME])):
        build_data = {"force_include": {}}
        hook.initialize(version, build_data)
        assert list(build_data["force_include"].values()) == expected
    hook.finalize("standard", build_data, "")
    assert not [path for path in build_data["force_include"] if Path(path).exists()]


def test_a_source_archive_builds_and_passes_its_commit_on_to_the_wheel(source, tmp_path):
    head = git(source, "rev-parse", "HEAD")
    with tarfile.open(built(SdistBuilder, source)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert embedded(built(WheelBuilder, unpacked)) == head + "\n"


def test_without_git_a_wheel_is_built_and_its_commit_is_unknown(source, monkeypatch):
    shutil.rmtree(source / ".git")
    assert embedded(built(WheelBuilder, source)) is None and commit.of_package(source / "dfkd_ray") is None
    git(source, "init", "-q")  # before the first commit
    assert embedded(built(WheelBuilder, source)) is None
    monkeypatch.setenv("PATH", "")
    assert commit.of_package(source / "dfkd_ray") is None
