"""Code of the working folder runs only where its module is named, and never in the place of what is installed."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import MODULE, SCRIPT, done, sweep_file
from dfkd_ray import bundles
from helpers import TINY_WORDS

IMPORTING = (
    "ray",
    "torch",
    "torchvision",
    "pandas",
    "pyarrow",
    "numpy",
    "tensorboard",
    "matplotlib",
    "pydantic",
    "rich",
)
IMPORT = re.compile(rb"^\s*(?:import|from)\s+([A-Za-z_]\w*)", re.MULTILINE)
FEW = ["--set", "batch_size=8", "--set", "num_steps=1", "--set", "num_threads=1"]
PLANTED = "open({mark!r}, 'w').close()\nraise ImportError('planted')\n"
# A trusted module that needs a sibling, and finds Python's own `heapq` although there is one beside it.
NETS = """
import heapq
assert heapq.heappush
import planted_sibling
from torch import nn

def make(width):
    import planted_late
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
"""


def names_that_are_imported() -> set[str]:
    """Of Python's library, of all that is installed, and of whatever the large packages try to import."""
    names = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names |= {name.partition(".")[0] for name in sys.modules}
    site = Path(torch.__file__).parent.parent
    for package in IMPORTING:
        for path in (site / package).rglob("*.py"):
            names |= {name.decode() for name in IMPORT.findall(path.read_bytes())}
    return {name for name in names if name.isidentifier()}


def names_before_ours(folder: Path) -> set[str]:
    """What `python -m` itself imports, or has imported, before a module of any package gets its first word."""
    (folder / "probe").mkdir()
    (folder / "probe" / "__init__.py").write_text("")
    (folder / "probe" / "__main__.py").write_text(
        "import sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    )
    told = subprocess.run([sys.executable, "-m", "probe"], cwd=folder, capture_output=True, text=True, check=True)
    return set(told.stdout.split())


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_teacher):
    """A folder with a bundle, and beside it a module of every name; what runs leaves a mark in another folder."""
    folder, marks = tmp_path_factory.mktemp("downloads"), tmp_path_factory.mktemp("marks")
    shutil.copytree(tiny_teacher, folder / "bundle")
    shutil.copytree(tiny_teacher, folder / "bundle.py")  # a name like a module's
    early = names_before_ours(tmp_path_factory.mktemp("early")) | {"dfkd_ray"}
    for name in names_that_are_imported():
        (folder / f"{name}.py").write_text(PLANTED.format(mark=str(marks / name)))
    return folder, marks, early


def commands(folder: Path) -> list[list[str]]:
    sweep_file(folder / "one.yaml", "bundle")
    return [
        ["teacher", "info", "bundle"],
        ["recover", "bundle", "--out", "recovered", *TINY_WORDS],
        [
            "synthesize",
            "bundle",
            "--out",
            "images",
            "--num-images",
            "8",
            "--synthesizers",
            "1",
            "--cache",
            "cache",
            *FEW,
        ],
        ["sweep", "one.yaml", "--results", "out", "--cache", "cache2", "--test-data", "none", "--synthesizers", "1"],
        ["results", "out"],
        ["report", "out", "--out", "report.html"],
    ]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("program", [SCRIPT, MODULE], ids=["script", "module"])
def test_no_module_of_the_working_folder_runs_unasked(planted, program, tmp_path):
    folder, marks, early = planted
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    for name in early if program is MODULE else ():  # what Python itself imports for `-m` is not ours to choose
        (work / f"{name}.py").unlink(missing_ok=True)
    for words in commands(work):
        ended = done([*program, *words], work)
        ran = sorted(path.name for path in marks.iterdir())
        assert not ran, (words, ran, ended.stdout[-500:], ended.stderr[-500:])
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
    assert len(list(work.glob("*.py"))) > 500


@pytest.fixture
def own_network(tmp_path):
    """A folder with a bundle whose network is code beside it."""
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "planted_sibling.py").write_text("")
    (tmp_path / "planted_late.py").write_text("")
    (tmp_path / "heapq.py").write_text("raise ImportError('planted')")
    words = ["--num-classes", "10", "--image-shape", "1x16x16", "--mean", "0.5", "--std", "0.25", "--out", "bundle"]
    words += ["--architecture", "own_nets:make", "--arguments", '{"width": 6}']
    program = "import torch, own_nets; torch.save(own_nets.make(6).state_dict(), 'weights.pt')"
    (tmp_path / "save.py").write_text(program)
    (tmp_path / "heapq.py").rename(tmp_path / "aside")
    subprocess.run([sys.executable, "save.py"], cwd=tmp_path, check=True)
    (tmp_path / "aside").rename(tmp_path / "heapq.py")
    made = done([*SCRIPT, "teacher", "import", "weights.pt", *words], tmp_path)
    assert made.returncode == 0, made.stderr
    return tmp_path


@pytest.mark.timeout(900)
def test_trusted_modules_of_the_working_folder_are_imported_in_every_process(own_network):
    sweep_file(own_network / "one.yaml", "bundle", **{"student.architecture": "own_nets:make"})
    data = (
        (own_network / "one.yaml")
        .read_text()
        .replace("architecture: own_nets:make", "architecture: own_nets:make\n    arguments: {width: 4}")
    )
    (own_network / "one.yaml").write_text(
        data.replace("grid:\n  pruning.sparsity:\n  - 0.5\n", "grid:\n  distillation.temperature: [2.0]\n")
    )
    recover = ["recover", "bundle", "--out", "recovered", *TINY_WORDS]
    synthesize = ["synthesize", "bundle", "--out", "images", "--num-images", "8", "--synthesizers", "1", *FEW]
    run_sweep = ["sweep", "one.yaml", "--results", "out", "--test-data", "none", "--synthesizers", "1"]
    # A sweep has every kind of process: ours, a synthesizer, a trial.
    for program, commands in ((SCRIPT, [recover, synthesize, run_sweep]), (MODULE, [recover, run_sweep])):
        for words in commands:
            refused = done([*program, *words, "--cache", "cache"], own_network)
            assert refused.returncode == 2 and "--trust-code own_nets" in refused.stderr, (words, refused.stderr)
            ended = done([*program, *words, "--cache", "cache", "--trust-code", "own_nets"], own_network)
            assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        rows = done([*program, "results", "out", "--format", "json"], own_network)
        assert [row["status"] for row in json.loads(rows.stdout)] == ["finished"], rows.stdout
        for name in ("recovered", "images", "out", "cache"):
            shutil.rmtree(own_network / name, ignore_errors=True)
    assert bundles.read_info(own_network / "bundle").architecture == "own_nets:make"
