"""Written files run where this package is not: in environments that have one runtime alone, by the lines of the card.

The default run links the installed runtime into an empty environment, which takes no time. `pytest -m venvs` installs
it there with pip instead, as a user does.
"""

import array
import subprocess
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

import dfkd_ray
from dfkd_ray.bundles import Teacher
from dfkd_ray.exporting import images, torch_files
from helpers import randomise_statistics

for name in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(name)

SHAPE, CLASSES, NUM_IMAGES = (3, 8, 8), 4, 3
PLACES = {"onnx": "net.onnx", "openvino": "net.xml", "torch-export": "net.pt2", "torch": "net"}
# What is installed, and what must not be found there.
RUNTIMES = {
    "onnx": (("onnxruntime", "numpy"), ("dfkd_ray", "torch", "onnx", "openvino")),
    "openvino": (("openvino", "numpy"), ("dfkd_ray", "torch", "onnx", "onnxruntime")),
    "torch-export": (("torch",), ("dfkd_ray", "onnx", "torchvision", "numpy", "safetensors")),
    "torch": (("torch", "safetensors"), ("dfkd_ray", "onnx", "torchvision", "numpy")),
}
NUMPY = "import numpy\nimages = numpy.array(array.array('f', given), numpy.float32).reshape({shape})\n"
TORCH = "import torch\nimages = torch.tensor(array.array('f', given).tolist()).reshape({shape})\n"
PROGRAM = """
import array, importlib.util, sys
for name in {absent!r}:
    assert importlib.util.find_spec(name) is None, name
given = open({given!r}, "rb").read()
{images}
pixels = images * 0.25 + 0.4
{card}
values = [float(value) for row in logits for value in row]
open({logits!r}, "wb").write(array.array("f", values).tobytes())
"""


class Residual(nn.Module):
    """A small network with a residual sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + x.flip(-1)).mean((2, 3)))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    network = Residual()
    randomise_statistics(network)
    return Teacher.from_network(network, num_classes=CLASSES, input_shape=SHAPE, mean=0.4, std=0.25, name="net")


@pytest.fixture
def exported(teacher, tmp_path, monkeypatch):
    """Writes a format on noise in the place of synthesis; gives the card's program and the folder to run it in."""
    drawn = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1)).numpy()
    monkeypatch.setattr(images, "made", lambda *_: images.Images(drawn, None, "noise of a test"))

    def write(format_: str) -> tuple[str, Path]:
        done = dfkd_ray.export(teacher, tmp_path / "files" / PLACES[format_], format=format_)
        lines = done.card.read_text().partition("```python\n")[2].partition("```")[0]
        return lines, done.card.parent

    return write


def distributions(names: tuple[str, ...]) -> Iterator[metadata.Distribution]:
    """Installed distributions with all that they require."""
    todo, seen = [(name, "") for name in names], set()
    while todo:
        name, extra = wanted = todo.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # not needed on this platform
            continue
        if not extra:
            yield found
        for each in map(Requirement, found.requires or ()):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                todo += [(each.name, extra) for extra in ("", *each.extras)]


def linked(folder: Path, names: tuple[str, ...]) -> Path:
    """An environment with links to installed distributions and what they require; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    own = next(folder.glob("lib/python*/site-packages"))
    for found in distributions(names):
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (own / top).exists():
                (own / top).symlink_to(source)
    return folder / "bin" / "python"


def run(python: Path, format_: str, card: str, cwd: Path, teacher: Teacher, tmp_path: Path) -> None:
    """Run the card's lines in an environment, and compare the logits with the network's."""
    drawn = torch.randn(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(2)).numpy()
    given, logits = tmp_path / "images", tmp_path / "logits"
    given.write_bytes(drawn.tobytes())
    made = (TORCH if "torch" in format_ else NUMPY).format(shape=(NUM_IMAGES, *SHAPE))
    program = PROGRAM.format(absent=RUNTIMES[format_][1], given=str(given), images=made, card=card, logits=str(logits))
    # Nothing of the caller's environment is seen; the folder with the files is the working folder.
    done = subprocess.run([str(python), "-E", "-s", "-c", program], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.array(array.array("f", logits.read_bytes())).reshape(NUM_IMAGES, CLASSES)
    expected = torch_files.runs(teacher.network)(drawn)
    # OpenVINO by itself computes in bfloat16 where the CPU has it.
    atol = (0.05 if format_ == "openvino" else 1e-4) * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("format_", RUNTIMES)
def test_the_card_s_lines_run_where_its_runtime_alone_is_seen(format_, teacher, exported, tmp_path):
    card, cwd = exported(format_)
    run(linked(tmp_path / "venv", RUNTIMES[format_][0]), format_, card, cwd, teacher, tmp_path)


@pytest.mark.venvs
@pytest.mark.parametrize("formats", [("onnx",), ("openvino",), ("torch-export", "torch")])
def test_the_card_s_lines_run_where_pip_installed_its_runtime_alone(formats, teacher, exported, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    for format_ in formats:  # the second needs more than the first
        card, cwd = exported(format_)
        wanted = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in RUNTIMES[format_][0]]
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        run(python, format_, card, cwd, teacher, tmp_path)
