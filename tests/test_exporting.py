"""Networks as files for other programs: each format gives the network's logits, and a wrong file is not kept."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import dfkd_ray
from dfkd_ray import bundles, exporting, storage
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import channels
from dfkd_ray.config import PruningConfig
from dfkd_ray.exporting import card, comparison, images, int8, metadata, onnx_files, source_code, torch_files
from dfkd_ray.exporting.code_layout import call, flat, laid_out, sequence, text
from dfkd_ray.heads import SOFTMAX
from helpers import assert_one_error, randomise_statistics, refusal

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

SHAPE, CLASSES = (3, 8, 8), 4
NAMES = {"onnx": "net.onnx", "torch-export": "net.pt2", "openvino": "net.xml", "torch": "net"}
by_format = pytest.mark.parametrize("format_", NAMES)


class Residual(nn.Module):
    """Plain, depthwise and grouped convolutions around a residual sum; a parameter of its own; a change in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8)) for groups in (8, 2)
        )
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        torch._assert(x.shape[1] == 3, "three channels")
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.scale * F.relu(block(x))
        x += 0.25
        a, b = x[:, :, ::2].mean((2, 3)), F.max_pool2d(x, 2).amax((2, 3))
        return self.fc(torch.cat([a, b], 1)[:, :8])


def plain() -> nn.Module:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pool, nn.Linear(8, CLASSES))


def without_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, CLASSES))


def signals() -> nn.Module:
    pool = (nn.AdaptiveAvgPool1d(2), nn.Flatten())
    return nn.Sequential(nn.Conv1d(2, 8, 5), nn.BatchNorm1d(8), nn.SiLU(), *pool, nn.Linear(16, CLASSES))


class InParts(nn.Module):
    """Its logits are one of two outputs, and it changes its images: hooks adapt it."""

    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        x.mul_(0.5)
        return self.inner(x).softmax(1)


def teacher_of(network: nn.Module, seed: int = 0, **described) -> Teacher:
    """A teacher whose logits differ between images."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    randomise_statistics(network, seed)
    shape = described.pop("input_shape", SHAPE)
    of = {"num_classes": CLASSES, "input_shape": shape, "mean": (0.4,) * shape[0], "std": 0.25, "name": "net"}
    return Teacher.from_network(network, **(of | described))


TEACHERS = {
    "plain": lambda: teacher_of(plain()),
    "residual, depthwise, grouped": lambda: teacher_of(Residual()),
    "without BatchNorm": lambda: teacher_of(without_batchnorm()),
    "signals": lambda: teacher_of(signals(), input_shape=(2, 40)),
    "independent labels": lambda: teacher_of(plain(), head="sigmoid"),
    "adapted by hooks": lambda: teacher_of(InParts()),
}


def noise(teacher: Teacher, num_images: int = 40, seed: int = 1) -> np.ndarray:
    """Normalised images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, *teacher.info.input_shape, generator=generator).numpy()


@pytest.fixture(autouse=True)
def quick_images(request, monkeypatch):
    """Noise instead of synthesis, but for the tests that are about the images."""
    if "synthesised" not in request.node.name:
        monkeypatch.setattr(images, "made", lambda teacher, calibrates, *_: made_of_noise(teacher, calibrates))


MODELS: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def converted_once(monkeypatch):
    """Each network is converted to ONNX once: that takes seconds, and both ONNX and OpenVINO begin with it."""

    def converted(teacher):
        key = bundles.sha256(bundles.safetensors_bytes(teacher.network.state_dict())) + repr(teacher.network)
        if key not in MODELS:
            MODELS[key] = onnx_files.converted(teacher.network, teacher.info.input_shape)
        return MODELS[key]

    for name in ("onnx", "openvino"):
        monkeypatch.setitem(exporting.FORMATS, name, replace(exporting.FORMATS[name], convert=converted))


def made_of_noise(teacher: Teacher, calibrates: bool) -> images.Images:
    return images.Images(noise(teacher), noise(teacher, 64, 2) if calibrates else None, "noise of a test")


def left(folder: Path) -> list[str]:
    """All names in a folder."""
    return sorted(path.name for path in folder.iterdir())


# ---- each format is the network --------------------------------------------------------------------------------------


# Two kinds differ from others in the metadata alone: one format is enough for them.
CASES = [
    (kind, name) for kind in TEACHERS for name in NAMES if name == "onnx" or kind not in ("plain", "independent labels")
]


@pytest.mark.parametrize(("kind", "format_"), CASES)
def test_every_format_gives_the_network_s_logits_for_batches_of_any_size(kind, format_, tmp_path):
    teacher = TEACHERS[kind]()
    done = dfkd_ray.export(teacher, tmp_path / NAMES[format_], format=format_)
    own = {"openvino": ["net.bin", "net.xml"], "torch": ["net"]}.get(format_, [NAMES[format_]])
    card = "net/README.md" if format_ == "torch" else f"{NAMES[format_]}.md"
    assert left(tmp_path) == sorted([*own, *([card] if format_ != "torch" else [])])
    assert done.path == tmp_path / NAMES[format_] and done.card == tmp_path / card and done.card.is_file()
    assert set(done.files) | {done.card} == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert done.comparison.agreement == 1.0 and done.size_bytes == done.float32_bytes > 0
    run = exporting.FORMATS[format_].open(done.path)
    for size in (1, 2, 13):
        given = noise(teacher, size, seed=size)
        expected = torch_files.runs(teacher.network)(given.copy())
        np.testing.assert_allclose(run(given), expected, atol=1e-4 * np.abs(expected).max(), rtol=1e-4)
    about = metadata.read(exporting.FORMATS[format_].read(done.path))
    assert about["weights_sha256"] == teacher.info.weights_sha256 and len(about["weights_sha256"]) == 64
    assert about["input_shape"] == list(teacher.info.input_shape) and about["num_classes"] == CLASSES
    assert (about["mean"], about["std"]) == (list(teacher.info.mean), list(teacher.info.std))
    assert about["pixel_range"] == [0.0, 1.0] and about["head"] == teacher.info.head and about["format"] == format_
    assert about["package_version"] == dfkd_ray.__version__ and about["precision"] == "float32"
    if format_ == "onnx":
        import onnx

        model = onnx.load(done.path)
        onnx.checker.check_model(model)
        assert model.opset_import[0].version == about["opset"] == 21
        assert str(tmp_path.anchor + "root").encode() not in done.path.read_bytes(), "no path of this machine"
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input] == ["batch"]


@pytest.mark.parametrize("format_", ["onnx", "openvino"])
@pytest.mark.parametrize("kind", ["residual, depthwise, grouped", "signals"])
def test_int8_agrees_and_its_file_says_so(kind, format_, tmp_path):
    teacher = TEACHERS[kind]()
    done = dfkd_ray.export(teacher, tmp_path / NAMES[format_], format=format_, precision="int8")
    assert done.is_int8 and done.comparison.agreement >= comparison.AGREEMENT["int8"]
    assert 0 < done.comparison.largest_difference < 2 * done.comparison.spread
    about = metadata.read(exporting.FORMATS[format_].read(done.path))
    assert about["precision"] == "int8" and about["format"] == format_
    if format_ == "onnx":
        import onnx

        model = onnx.load(done.path)
        assert {each.domain: each.version for each in model.opset_import}[""] == about["opset"]
        assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}


def test_an_int8_file_of_a_network_with_weights_is_a_quarter(tmp_path):
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
    teacher = teacher_of(nn.Sequential(wide, nn.Linear(1024, CLASSES)))
    done = dfkd_ray.export(teacher, tmp_path / "net.onnx", precision="int8")
    assert 0.2 < done.size_bytes / done.float32_bytes < 0.4
    assert done.float32_bytes == pytest.approx(done.dense_bytes, rel=0.1)


def test_after_the_correction_of_biases_the_mean_logits_are_those_of_the_network(tmp_path, monkeypatch):
    teacher, found = TEACHERS["residual, depthwise, grouped"](), []
    calibration = made_of_noise(teacher, True).calibration
    assert calibration is not None
    expected = torch_files.runs(teacher.network)(calibration).mean(0)
    corrected = int8.corrected
    for number, change in enumerate((lambda model, _float, _images: model, corrected)):
        monkeypatch.setattr(int8, "corrected", change)
        path = dfkd_ray.export(teacher, tmp_path / f"{number}.onnx", precision="int8").path
        found.append(np.abs(onnx_files.open_model(path)(calibration).mean(0) - expected).max())
    assert found[1] < found[0] / 2


@pytest.mark.parametrize("test", [[], [Batch(0, np.zeros((0, *SHAPE), np.uint8), np.zeros(0, np.int64), "none")]])
def test_a_test_set_without_images_is_refused(test, tmp_path):
    refusal(lambda: dfkd_ray.export(TEACHERS["plain"](), tmp_path / "net", format="torch", test=test), "no images")
    assert left(tmp_path) == []


def test_accuracies_of_file_and_network_are_measured_on_given_batches(tmp_path):
    teacher = TEACHERS["plain"]()
    stored = np.random.default_rng(0).integers(0, 256, (24, *SHAPE), dtype=np.uint8)
    labels = torch_files.runs(teacher.network)(images.normalised(teacher, stored)).argmax(1)
    labels[:6] = (labels[:6] + 1) % CLASSES
    batches = [Batch(0, stored[:13], labels[:13], "test"), Batch(1, stored[13:], labels[13:], "test")]
    done = dfkd_ray.export(teacher, tmp_path / "net", format="torch", test=batches)
    assert done.accuracy == done.network_accuracy == 0.75


# ---- source code -----------------------------------------------------------------------------------------------------


def test_source_code_is_formatted_normalises_and_can_be_trained_further(tmp_path):
    teacher = TEACHERS["residual, depthwise, grouped"]()
    dfkd_ray.export(teacher, tmp_path / "net", format="torch")
    file = tmp_path / "net" / "model.py"
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--check", "--line-length", "120", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    code = file.read_text()
    assert "self.blocks[0][0](x)" in code and "nn.Conv2d(8, 8, kernel_size=3, padding=1, groups=8)" in code
    assert "import dfkd_ray" not in code and "_assert" not in code and "pickle" not in code
    module: dict = {"__file__": str(file), "__name__": "model"}
    exec(compile(code, str(file), "exec"), module)
    pixels = torch.rand(2, *SHAPE)
    expected = (pixels - 0.4) / 0.25
    torch.testing.assert_close(module["normalised"](pixels), expected)
    network = module["load"]().train()
    network(expected).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert left(tmp_path / "net") == ["README.md", "model.py", "weights.safetensors"]


HOSTILE = ['"""\nimport os\nos._exit(7)\n"""', "'); import os; os._exit(7)  #", "\\", "{0}", "\u202e", '"\\"', "a\nb"]


def test_no_text_of_a_bundle_becomes_code(tmp_path):
    teacher = TEACHERS["plain"]()
    for number, word in enumerate(HOSTILE):
        names = (word, "b", "c", "d")
        info = teacher.info.model_copy(update={"class_names": names, "dataset": word, "notes": {"a": word}})
        hostile = replace(teacher, info=info, name=word)
        path = dfkd_ray.export(hostile, tmp_path / str(number), format="torch").path
        module: dict = {"__file__": str(path / "model.py"), "__name__": "model"}
        exec(compile((path / "model.py").read_text(encoding="ascii"), "model", "exec"), module)
        assert module["CLASS_NAMES"] == names
        assert metadata.read(torch_files.read_source(path))["class_names"] == list(names)


def test_names_of_parts_that_are_no_python_names_are_reached(tmp_path):
    network = nn.Sequential()
    parts = {"a b": nn.Conv2d(3, 4, 3), "class": nn.ReLU(), "__x": nn.BatchNorm2d(4), "007": nn.Flatten()}
    for name, part in parts.items():
        network.add_module(name, part)
    network.add_module("'); quit()", nn.Linear(144, CLASSES))
    done = dfkd_ray.export(teacher_of(network), tmp_path / "net", format="torch")
    assert done.comparison.agreement == 1.0


class Branching(nn.Module):
    """It looks at its images."""

    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        return self.inner(x * 2 if bool(x.sum() > 1e9) else x)


class Answers(nn.Module):
    """It answers with a dict."""

    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        return {"logits": self.inner(x), "images": x}


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_network_that_branches_is_refused_in_one_line_and_one_that_answers_with_a_dict_exported(
    format, tmp_path, capfd
):
    call = lambda: dfkd_ray.export(teacher_of(Branching()), tmp_path / NAMES[format], format=format)  # noqa: E731
    refusal(call, "its code branches on the values of images")
    assert capfd.readouterr().err == "" and left(tmp_path) == []
    assert dfkd_ray.export(teacher_of(Answers()), tmp_path / NAMES[format], format=format).comparison.agreement == 1.0


class Fixed(nn.Module):
    """Its code holds a size of the batch."""

    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        return torch.cat([self.inner(row[None]) for row in x])


class Own(torch.autograd.Function):
    """A function that no exporter knows."""

    @staticmethod
    def forward(ctx, x):
        return torch.special.bessel_j0(x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0]


class Bessel(nn.Module):
    """A part with an operator that ONNX does not have."""

    def forward(self, x):
        return Own.apply(x)


@fx.wrap
def foreign(x):
    return x * 2


class Calling(nn.Module):
    """A part that calls a function which a trace does not follow, and which is not PyTorch's."""

    def forward(self, x):
        return foreign(x)


class Unsupported(nn.Module):
    """Its end has a part that a format cannot hold."""

    def __init__(self, part: type[nn.Module] = Bessel):
        super().__init__()
        self.inner = plain()
        self.tail = nn.Sequential(nn.Identity(), part())

    def forward(self, x):
        return self.tail(self.inner(x))


class Foreign(Unsupported):
    """The same for source code."""

    def __init__(self):
        super().__init__(Calling)


@pytest.mark.parametrize(
    ("network", "format_", "says"),
    [
        (Branching, "torch", "cannot be written as source code"),
        (Branching, "onnx", "cannot be exported"),
        (Fixed, "torch-export", "cannot be exported"),
        (Unsupported, "onnx", "cannot be written as ONNX: tail.1 (Bessel) uses the operator prims.bessel_j0,"),
        (Foreign, "torch", "tail.1 (Calling) calls foreign, which is not PyTorch's; take format onnx"),
    ],
)
def test_a_network_that_a_format_cannot_hold_is_refused_with_the_reason(network, format_, says, tmp_path):
    teacher = teacher_of(network())
    refusal(lambda: dfkd_ray.export(teacher, tmp_path / "new" / NAMES[format_], format=format_), says)
    assert left(tmp_path) == []


def test_code_is_laid_out_by_its_width():
    code = call("f", ["x" * 45, sequence(["y" * 45], True)], {"name": text("z")})
    assert flat(code) == f'f({"x" * 45}, ({"y" * 45},), name="z")'
    assert laid_out("a = ", code).count("\n") == 0
    assert laid_out("a = ", code, 12).splitlines()[0] == " " * 12 + "a = f("
    for word in HOSTILE:
        assert eval(text(word)) == word and text(word).isascii() and "\n" not in text(word)


def test_variables_are_not_overwritten_while_they_are_needed():
    class Crossing(nn.Module):
        def forward(self, images):
            a = images + 1
            b = a * 2
            a += b  # b stays, a changes
            c = a.relu_()
            return torch.cat([b, c, a, images])

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Crossing()

        def forward(self, images):
            return self.network(images)

    lines = source_code.source(Around()).forward
    names: dict = {"images": torch.randn(2, 3), "torch": torch, "F": F}
    exec("def forward(images):\n" + "\n".join(lines), names)
    given = torch.randn(2, 3)
    assert torch.equal(names["forward"](given.clone()), Crossing()(given.clone()))


# ---- nothing wrong is kept -------------------------------------------------------------------------------------------


@by_format
def test_a_file_that_is_not_the_network_is_an_error_and_is_not_kept(format_, tmp_path, monkeypatch):
    teacher, other = TEACHERS["plain"](), teacher_of(plain(), seed=1)
    row = exporting.FORMATS[format_]
    monkeypatch.setitem(exporting.FORMATS, format_, replace(row, convert=lambda _teacher: row.convert(other)))
    with pytest.raises(FloatingPointError, match="is not the network: on 40 images it agrees on"):
        dfkd_ray.export(teacher, tmp_path / "new" / NAMES[format_], format=format_)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "precision", "passes"),
    [
        (lambda y: y, "float32", True),
        (lambda y: y + 1e-6, "float32", True),
        (lambda y: y + 0.01 * y.std(), "float32", False),
        (lambda y: y + 0.01 * y.std(), "float16", True),
        (lambda y: y + 0.1 * y.std(), "float16", False),
        (lambda y: y + 0.1 * y.std(), "int8", True),
        (lambda y: np.where(np.arange(len(y))[:, None] == 3, np.nan, y), "int8", False),
        (lambda y: np.where(np.arange(len(y))[:, None] == 3, np.nan, y), None, False),
        (lambda y: y[:, ::-1], "float16", False),
        (lambda y: y[:, ::-1], "int8", False),
        (lambda y: y[:, :-1], "float32", False),
    ],
)
def test_the_comparison_refuses_what_is_not_the_network(change, precision, passes):
    expected = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    given = np.arange(50, dtype=np.float32)

    def run(batch):
        return change(expected)[batch.astype(int)]

    if passes:
        found = comparison.compared(run, given, expected, SOFTMAX, precision)
        assert found.agreement == 1.0 and found.num_images == 50 and found.kl < 0.01
    else:
        with pytest.raises(FloatingPointError, match="not kept"):
            comparison.compared(run, given, expected, SOFTMAX, precision)


def test_a_file_is_run_in_batches_of_two_sizes_and_on_every_image_once():
    sizes, seen = [], []

    def run(batch):
        sizes.append(len(batch))
        seen.extend(batch.tolist())
        return batch[:, None]

    comparison.in_batches(run, np.arange(17, dtype=np.float32))
    assert sizes == [1, 7, 1, 7, 1] and seen == list(range(17))


@by_format
@pytest.mark.parametrize("where", ["write_files", "place"])
def test_a_full_disk_leaves_nothing(format_, where, tmp_path, monkeypatch):
    def full(*_args, **_named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    row = exporting.FORMATS[format_]
    quick = replace(row, convert=lambda teacher: teacher, open=lambda _path: torch_files.runs(teacher.network))
    suffixes = {"torch": ["model.py", "weights.safetensors"], "openvino": [".bin", ".xml"]}.get(format_, [row.suffix])
    quick = replace(quick, write=lambda _model, _texts: dict.fromkeys(suffixes, b"x"))
    monkeypatch.setitem(exporting.FORMATS, format_, quick)
    teacher = TEACHERS["plain"]()
    if where == "write_files":
        monkeypatch.setattr(storage, "write_files", full)
    else:
        real = os.link

        def at_the_last(source, target):
            if str(target).endswith(row.suffix):
                full()
            real(source, target)

        monkeypatch.setattr(os, "link" if row.suffix else "replace", at_the_last if row.suffix else full)
        monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError):
        dfkd_ray.export(teacher, tmp_path / "new" / NAMES[format_], format=format_)
    assert left(tmp_path) == []


# ---- the images ------------------------------------------------------------------------------------------------------


def test_compared_is_on_mixtures_synthesised_from_batchnorm_and_calibrated_on_others(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "NUM_CALIBRATION", 8)
    monkeypatch.setattr(images, "SIZES", {"batch_size": 8, "num_steps": 1, "num_threads": 1})
    monkeypatch.setattr(images, "NUM_COMPARED", 8)
    teacher = teacher_of(signals(), input_shape=(2, 40))
    making = images.Making("cpu", tmp_path / "cache")
    first = images.made(teacher, True, making)
    assert first.source == "synthesised from its BatchNorm statistics"
    assert first.calibration is not None and first.compared.shape == first.calibration.shape == (8, 2, 40)
    assert not np.array_equal(first.compared, first.calibration)
    again = images.made(teacher, False, making)
    assert np.array_equal(again.compared, first.compared) and again.calibration is None


def test_without_batchnorm_and_records_the_images_are_noise_and_not_synthesised():
    made = images.made(teacher_of(without_batchnorm()), True, images.Making("cpu"))
    assert made.source.startswith("Gaussian noise") and made.compared.shape == (128, *SHAPE)


def test_images_are_synthesised_from_a_record_where_there_is_one(monkeypatch):
    teacher = teacher_of(without_batchnorm())
    monkeypatch.setattr(Teacher, "record_kinds", lambda _self: ["all", "top"])
    method, source = images.method_of(teacher)
    assert (method["method"], method["record"]) == ("records", "all") and source.endswith("activation record all")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_and_prints_few_lines_of_80_columns(run_cli, tiny_teacher, tmp_path):
    done = run_cli("export", str(tiny_teacher), "--out", str(tmp_path / "net.onnx"), "--int8")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[:2] == [f"written: {tmp_path / 'net.onnx'}", f"its model card: {tmp_path / 'net.onnx.md'}"]
    assert len(lines) <= 9 and all(len(line) <= 80 for line in lines[2:])
    assert (
        "agreement" in done.out and "of the float32 file" in done.out and left(tmp_path) == ["net.onnx", "net.onnx.md"]
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--format", "torch", "--out", "net", "--int8"], ["--int8", "onnx or openvino", "torch"]),
        (["--format", "tflite", "--out", "net"], ["--format 'tflite'", "onnx, torch-export, openvino, torch, bundle"]),
        (["--out", "net.onnx", "--float16"], ["--float16", "format bundle, not with onnx"]),
        (["--out", "net.onnx", "--int8", "--float16"], ["--int8 and --float16", "expected one of them"]),
        (["--format", "bundle", "--out", "net", "--push", "owner/name"], ["--push", "bundle"]),
        (["--out", "net.pt2"], ["net.pt2", "ends in .onnx"]),
        (["--out", "there.onnx"], ["there.onnx", "there already"]),
        (["--format", "torch", "--out", "full"], ["full", "there already"]),
        (["--format", "torch", "--out", "."], ["the working folder"]),
        (["--format", "openvino", "--out", "there.xml"], ["there.bin", "there already"]),
        (["--out", "there.onnx/net.onnx"], ["there.onnx", "expected a folder"]),
        (["--out", "net.onnx", "--test-data", "nowhere"], ["nowhere"]),
        (["--out", "net.onnx", "--device", "tpu"], ["tpu"]),
    ],
)
def test_a_wrong_word_is_one_line_and_writes_nothing(run_cli, tiny_teacher, tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("there.onnx", "there.bin", "full/x"):
        (tmp_path / name).write_text("mine")
    assert_one_error(run_cli("export", str(tiny_teacher), *words), 2, *parts)
    assert left(tmp_path) == ["full", "there.bin", "there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "mine" and left(tmp_path / "full") == ["x"]


@pytest.mark.parametrize(("format_", "module"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_extra_is_one_line_before_any_work(run_cli, tmp_path, monkeypatch, format_, module):
    monkeypatch.setitem(sys.modules, module, None)
    done = run_cli("export", "no-such-bundle", "--format", format_, "--out", str(tmp_path / NAMES[format_]))
    assert_one_error(done, 2, module, f"pip install 'dfkd_ray[{format_}]'")
    assert left(tmp_path) == []


def test_a_mismatch_is_exit_1_and_leaves_nothing(run_cli, tiny_teacher, tmp_path, monkeypatch):
    wrong = replace(exporting.FORMATS["torch"], open=lambda _path: lambda x: np.zeros((len(x), 10), np.float32))
    monkeypatch.setitem(exporting.FORMATS, "torch", wrong)
    done = run_cli("export", str(tiny_teacher), "--format", "torch", "--out", str(tmp_path / "net"))
    assert_one_error(done, 1, "is not the network", "not kept")
    assert left(tmp_path) == []


def test_a_student_with_fewer_channels_is_exported_as_small_as_it_is(tmp_path):
    """Source code is the format that is made from the layers' attributes."""
    dense = dfkd_ray.load("fashion_mnist_resnet8")
    config = PruningConfig(structure="channels", sparsity=0.5, importance="magnitude")
    found = channels.prepare(dense.network, dense.info.image_shape, config.importance)
    choice = channels.choose(dense.network, found, config)
    changes = {"shape_edits": choice.edits, "schema_version": "dfkd_ray.bundle/2"}
    small = channels.sliced(dense.network, choice.edits)
    bundles.save(tmp_path / "student", dense.info.model_copy(update=changes), small.state_dict())
    done = dfkd_ray.export(str(tmp_path / "student"), tmp_path / "net", format="torch")
    assert done.comparison.agreement == 1
    assert done.dense_bytes == sum(4 * tensor.numel() for tensor in small.state_dict().values())


def test_a_pruned_student_of_a_bundle_is_exported_dense(tmp_path):
    teacher = TEACHERS["plain"]()
    torch.manual_seed(0)
    network = dfkd_ray.load("fashion_mnist_resnet8").network
    state = {
        name: tensor * (torch.rand_like(tensor) < 0.1) if tensor.ndim == 4 else tensor
        for name, tensor in network.state_dict().items()
    }
    pruned = [name for name, tensor in state.items() if tensor.ndim == 4]
    info = dfkd_ray.load("fashion_mnist_resnet8").info
    bundles.save(tmp_path / "student", info, state, pruned)
    done = dfkd_ray.export(str(tmp_path / "student"), tmp_path / "net", format="torch")
    from safetensors.torch import load_file

    weights = load_file(done.path / "weights.safetensors")
    assert weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)
    assert teacher is not None and json.loads(torch_files.read_source(done.path)["num_classes"]) == 10


# ---- bad input, and interrupts ---------------------------------------------------------------------------------------


def edited(folder: Path, **changes) -> Path:
    """A bundle of a small network, whose teacher.json is changed afterwards."""
    info = dfkd_ray.load("fashion_mnist_resnet8").info
    bundles.save(folder, info, dfkd_ray.load("fashion_mnist_resnet8").network.state_dict())
    file = folder / "teacher.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


SLICED = {"schema_version": "dfkd_ray.bundle/2"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"schema_version": "dfkd_ray.bundle/9"}, ["dfkd_ray.bundle/9", "this version reads"]),
        (SLICED | {"shape_edits": [{"module": "nowhere", "dimension": "out", "kept": [0]}]}, ["nowhere", "no layer"]),
        (SLICED | {"shape_edits": [{"module": "conv1", "dimension": "out", "kept": [999]}]}, ["conv1", "999"]),
        (SLICED | {"shape_edits": [{"module": "conv1", "dimension": "out", "kept": [0, 1]}]}, ["conv1"]),
    ],
)
def test_a_bundle_that_this_version_cannot_build_is_one_line_and_writes_nothing(run_cli, tmp_path, changes, parts):
    bundle, out = edited(tmp_path / "bundle", **changes), tmp_path / "new" / "net"
    assert_one_error(run_cli("export", str(bundle), "--format", "torch", "--out", str(out)), 2, *parts)
    assert left(tmp_path) == ["bundle"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(run_cli, tmp_path, monkeypatch, number):
    def refused(*_args, **_named):
        raise OSError(number, os.strerror(number), str(tmp_path / ".hidden"))

    monkeypatch.setattr(exporting.placing.tempfile, "mkdtemp", refused)
    done = run_cli("export", "no-such-bundle", "--format", "torch", "--out", str(tmp_path / "new" / "net"))
    assert_one_error(done, 3, f"{tmp_path}: ", os.strerror(number))
    assert ".hidden" not in done.err and left(tmp_path) == []


def test_a_place_where_nothing_can_be_made_is_noticed_before_any_work(run_cli):
    """No user may write there, root neither."""
    assert_one_error(run_cli("export", "no-such-bundle", "--out", "/proc/net.onnx"), 3, "/proc")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_one_line_and_leaves_nothing(run_cli, tiny_teacher, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        done = run_cli("export", str(tiny_teacher), "--format", "torch", "--out", str(small / "new" / "net"))
        assert_one_error(done, 3, "No space left", "free some space")
        assert left(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def interrupting(function, when=lambda *_given, **_named: True):
    """A function that is interrupted as by Ctrl-C when it has done its work."""

    def interrupted(*given, **named):
        result = function(*given, **named)
        if when(*given, **named):
            signal.raise_signal(signal.SIGINT)
        return result

    return interrupted


STAGES = ("convert", "write", "hidden", "written", "open", "card", "added", "first", "last")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("format_", ["torch", "openvino"])
def test_an_interrupted_export_leaves_nothing(format_, stage, run_cli, tiny_teacher, tmp_path, monkeypatch):
    row = exporting.FORMATS[format_]
    if format_ == "openvino":  # its two files and the card are moved one after the other
        network = dfkd_ray.load(str(tiny_teacher)).network
        quick = {"convert": lambda *_: None, "open": lambda _path: torch_files.runs(network)}
        row = replace(row, **quick, write=lambda *_: {".bin": b"x", ".xml": b"x"}, needs=())
    if stage in ("convert", "write", "open"):
        row = replace(row, **{stage: interrupting(getattr(row, stage))})
    monkeypatch.setitem(exporting.FORMATS, format_, row)
    places = {
        "hidden": (exporting.placing.Path, "mkdir"),
        "written": (storage, "write_files"),
        "card": (card, "text"),
        "added": (exporting.placing, "add"),
        "first": (os, "link" if row.suffix else "replace"),
        "last": (os, "link" if row.suffix else "replace"),
    }
    if stage in places:
        last = str(tmp_path / "new" / NAMES[format_])
        when = (lambda _source, target: str(target) == last) if stage == "last" else (lambda *_, **__: True)
        monkeypatch.setattr(*places[stage], interrupting(getattr(*places[stage]), when))
    done = run_cli("export", str(tiny_teacher), "--format", format_, "--out", str(tmp_path / "new" / NAMES[format_]))
    assert_one_error(done, 130, "interrupted")
    assert left(tmp_path) == []
