"""The import contracts refuse what they are there to refuse."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def lint(folder: Path) -> tuple[int, str]:
    """Exit code and output of `lint-imports` on the package in a folder."""
    command = str(Path(sys.executable).with_name("lint-imports"))
    done = subprocess.run([command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package's modules and of the contracts."""
    shutil.copytree(
        REPOSITORY / "dfkd_ray", tmp_path / "dfkd_ray", ignore=shutil.ignore_patterns("bundled", "__pycache__")
    )
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_package_keeps_its_contracts(package):
    code, text = lint(package)
    assert (code, "0 broken" in text) == (0, True), text


def test_a_stray_module_breaks_the_layers(package):
    (package / "dfkd_ray" / "stray.py").write_text('"""In no layer."""\n')
    code, text = lint(package)
    assert code == 1 and "Imports point down only; every module has its layer BROKEN" in text and "stray" in text


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("records/fitting.py", "import ray", "Ray is imported by"),
        ("trial/__init__.py", "import ray", "Ray is imported by"),
        ("synthesis/deepinversion.py", "from dfkd_ray import data", "Data-free: real data"),
        ("sweep/worker.py", "from dfkd_ray import teachers", "Data-free: teachers"),
        ("config/__init__.py", "from dfkd_ray import trial", "Imports point down only"),
        ("report/page.py", "import torch", "The report reads Parquet alone"),
    ],
)
def test_an_import_that_is_forbidden_breaks_its_contract(package, module, line, contract):
    path = package / "dfkd_ray" / module
    path.write_text(path.read_text() + f"\n\ndef stray():\n    {line}\n")
    code, text = lint(package)
    broken = text.partition("Broken contracts")[2]
    assert code == 1 and contract in broken, text
