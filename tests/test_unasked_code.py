"""Code of the working folder runs only where its module is named, and never in the place of what is installed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from commands import MODULE, SCRIPT, done, sweep_file
from dfkd_ray import bundles, results
from helpers import TINY_WORDS, tiny_sweep, write_yaml

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
INFO = ["teacher", "info", "bundle"]
RECOVER = ["recover", "bundle", "--out", "recovered", *TINY_WORDS]
SYNTHESIZE = ["synthesize", "bundle", "--out", "images", "--num-images", "8", "--synthesizers", "1", "--cache", "cache"]
SYNTHESIZE += ["--set", "batch_size=8", "--set", "num_steps=1", "--set", "num_threads=1"]
SWEEP = ["sweep", "one.yaml", "--results", "out", "--cache", "cache2", "--test-data", "none", "--synthesizers"]
REPORT = ["report", "out", "--out", "report.html"]
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


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("program", "commands"),
    [(SCRIPT, [INFO, RECOVER, [*SWEEP, "0"], ["results", "out"], REPORT]), (MODULE, [SYNTHESIZE])],
    ids=["script", "module"],
)
def test_no_module_of_the_working_folder_runs_unasked(planted, program, commands, tmp_path):
    """Each command once; by either program this process, and workers of Ray."""
    folder, marks, early = planted
    work = tmp_path / "work"
    shutil.copytree(folder, work, copy_function=os.link)
    for name in early if program is MODULE else ():  # what Python itself imports for `-m` is not ours to choose
        (work / f"{name}.py").unlink(missing_ok=True)
    sweep_file(work / "one.yaml", "bundle")
    for words in commands:
        ended = done([*program, *words], work)
        ran = sorted(path.name for path in marks.iterdir())
        assert not ran, (words, ran, ended.stdout[-500:], ended.stderr[-500:])
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
    assert len(list(work.glob("*.py"))) > 500


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """A folder with a bundle whose network is code beside it."""
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "planted_sibling.py").write_text("")
    (tmp_path / "planted_late.py").write_text("")
    (tmp_path / "heapq.py").write_text("raise ImportError('planted')")
    with monkeypatch.context() as patch:
        for name in ("planted_sibling", "planted_late"):
            patch.setitem(sys.modules, name, ModuleType(name))
        exec(NETS, code := {})
        torch.save(code["make"](6).state_dict(), tmp_path / "weights.pt")
    words = ["--num-classes", "10", "--image-shape", "1x16x16", "--mean", "0.5", "--std", "0.25", "--out", "bundle"]
    words += ["--architecture", "own_nets:make", "--arguments", '{"width": 6}']
    made = done([*SCRIPT, "teacher", "import", "weights.pt", *words], tmp_path)
    assert made.returncode == 0, made.stderr
    return tmp_path


@pytest.mark.timeout(900)
def test_trusted_modules_of_the_working_folder_are_imported_in_every_process(own_network, run_cli, monkeypatch):
    student = {"student.architecture": "own_nets:make", "student.arguments": {"width": 4}}
    write_yaml(own_network / "one.yaml", tiny_sweep("bundle", {"distillation.temperature": [2.0]}, **student))
    monkeypatch.chdir(own_network)
    # A sweep has every kind of process: ours, a synthesizer, a trial.
    for program, words in ((SCRIPT, RECOVER), (SCRIPT, [*SWEEP, "1"]), (MODULE, SYNTHESIZE)):
        refused = run_cli(*words)
        assert refused.code == 2 and "--trust-code own_nets" in refused.err, (words, refused.err)
        ended = done([*program, *words, "--trust-code", "own_nets"], own_network)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
    assert results.read(own_network / "out", "trials")["status"].tolist() == ["finished"]
    assert bundles.read_info(own_network / "bundle").architecture == "own_nets:make"
