"""Writes a trained network for other programs (ONNX, torch.export, OpenVINO, PyTorch source code) or as a bundle.

`FORMATS` has a row per format. The common path is in `export`: convert the network, write the files beside their place,
run them on images and compare the logits with the network's, and only then rename them to their place.
"""

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkd_ray import bundles, evaluation
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher
from dfkd_ray.devices import Runtime
from dfkd_ray.exporting import comparison, images, metadata, placing, torch_files
from dfkd_ray.exporting.comparison import Run
from dfkd_ray.exporting.formats import FORMATS as FORMATS
from dfkd_ray.exporting.formats import ONNX as ONNX
from dfkd_ray.exporting.images import Making as Making
from dfkd_ray.exporting.onnx_files import PRODUCER
from dfkd_ray.heads import HEADS, Head
from dfkd_ray.plain import given

CPU, DEVICES = torch.device("cpu"), ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the network.

    `files`: all that was written but the card, the main file last. `size_bytes` is of all of them, `float32_bytes` what
    the same format takes in float32, `dense_bytes` the network's tensors in float32. `comparison` is on images that
    are not data (`images` says where they are from). Accuracies, in [0, 1], are None without test batches; `test_set`
    has their set's name, number of images and SHA-256. `warning`: what to look at, or None. `is_of_trial`: the
    file and the accuracies are those of a trial.
    """

    path: Path
    files: tuple[Path, ...]
    card: Path
    format: str
    precision: str
    size_bytes: int
    float32_bytes: int
    dense_bytes: int
    images: str
    comparison: comparison.Comparison
    accuracy: float | None = None
    network_accuracy: float | None = None
    test_set: Mapping[str, Any] | None = None
    warning: str | None = None
    is_of_trial: bool = False

    @property
    def is_int8(self) -> bool:
        """Whether weights and activations are int8."""
        return self.precision == "int8"


def export(
    network: Teacher | str | Path,
    path: Path | str,
    *,
    format: str = "onnx",
    precision: str = "float32",
    test: Sequence[Batch] | None = None,
    row: Mapping[str, Any] | None = None,
    download: bool = False,
    making: Making = Making(),  # noqa: B008 - it is frozen
) -> Exported:
    """Write a network in a format of `FORMATS`, run what was written, and keep it if it is the network.

    `network`: a bundle's folder, URI or name, a library's network by name, or a `Teacher` (`Teacher.from_network` makes
    one from a module in memory, `dfkd_ray.load` with `trust_code` one whose architecture is code). The file takes
    normalised images in batches of any size. `precision`: int8 quantises weights and activations, on synthetic images;
    float16 rounds the weights of a bundle (see `bundle_files`). `test`: test batches, for reporting only.
    `row`: of the trial that made the network, for the model card; a bundle's own is looked for beside it. `making`:
    where the synthetic images are made and kept.

    A model card is written with it: README.md in a folder, NAME.md beside a file NAME.

    `ValueError` for wrong arguments, a target that exists, a missing extra, or a network that the format cannot hold;
    `OSError` for a place that cannot be written; `FloatingPointError` if the written file does not compute what the
    network computes. Then nothing is left behind.
    """
    # A trial imports this package, and needs neither; `origins` reads tables, with pandas.
    from dfkd_ray.exporting import card, origins

    path = check(path, format, precision, making.device)
    if isinstance(network, nn.Module):
        raise ValueError(
            "network is an nn.Module: make a teacher of it with `Teacher.from_network`, which describes it"
        )
    teacher = network if isinstance(network, Teacher) else bundles.load(network, download=download)
    info, head, kind = teacher.info, HEADS[teacher.info.head], FORMATS[format]
    evaluation.check_test(test or (), info.image_shape, info.num_classes, head)
    if test is not None and not any(len(batch.labels) for batch in test):
        raise ValueError("the test set has no images")
    row = origins.row_of(teacher) if row is None else row
    own = kind.round(teacher) if precision == "float16" and kind.round is not None else teacher
    int8 = precision == "int8"
    with quiet():  # what cannot be converted is refused before images are made
        model, rounded = kind.convert(teacher), kind.convert(own) if own is not teacher else None
    made = images.made(teacher, int8, making)
    with quiet():
        expected = torch_files.runs(teacher.network)(made.compared)
        if not np.isfinite(expected).all():
            raise ValueError(
                f"{teacher.name}: its logits on synthetic images are not finite numbers; nothing to compare"
            )
        files = written_files(model, teacher, format)
        float32_bytes = num_bytes(files)
        if rounded is not None:
            files = written_files(rounded, own, format)
        elif int8:
            files = written_files(model, teacher, format, made.calibration)
        with placing.beside(path, kind, files) as written:
            run = kind.open(written)
            compared = comparison.compared(run, made.compared, expected, head, precision)
            accuracies = measured(run, teacher, test, head, Runtime(CPU, info.space))
            done = Exported(
                path=path,
                files=tuple(placing.files(path, kind, files)),
                card=placing.card_place(path, kind),
                format=format,
                precision=precision,
                size_bytes=num_bytes(files),
                float32_bytes=float32_bytes,
                dense_bytes=sum(4 * tensor.numel() for tensor in teacher.network.state_dict().values()),
                images=made.source,
                comparison=compared,
                accuracy=accuracies[0],
                network_accuracy=accuracies[1],
                test_set=evaluation.test_set(test) if test else None,
                warning=warning_of(compared, int8),
            )
            placing.add(written, done.card, card.text(done, own, row).encode())
    return done


def check(path: Path | str, format: str, precision: str, device: str = "auto") -> Path:
    """The path, if a format may be written there; else `ValueError` (one line), before any work."""
    if format not in FORMATS:
        raise ValueError(f"`format={given(format)}`: expected one of {', '.join(FORMATS)}")
    if device not in DEVICES:
        raise ValueError(f"`device={given(device)}`: expected {', '.join(DEVICES)}")
    row, path = FORMATS[format], Path(os.path.abspath(os.path.expanduser(path)))
    if precision not in PRECISIONS:
        raise ValueError(f"`precision={given(precision)}`: expected {', '.join(PRECISIONS)}")
    for name, makes in (("int8", lambda each: each.quantise), ("float16", lambda each: each.round)):
        if precision == name and makes(row) is None:
            able = " or ".join(name for name, each in FORMATS.items() if makes(each))
            raise ValueError(f"`{precision}` goes with format {able}, not with {format}")
    check_installed(f"format {format}", row.needs, row.extra)
    placing.check(path, row)
    return path


def is_own_onnx(data: bytes) -> bool:
    """Whether the beginning of a file is that of an ONNX file which this package wrote: it names its producer."""
    return PRODUCER.encode() in data[:32]


def check_installed(what: str, names: Sequence[str] = ONNX, extra: str | None = "onnx", instead: str = "") -> None:
    """`ValueError` if modules that `what` needs cannot be found. `instead`: what else could be done, for the end."""
    missing = not_installed(names)
    if missing:
        raise ValueError(
            f"{what} needs {', '.join(missing)}, not installed here: pip install 'dfkd_ray[{extra}]'{instead}"
        )


def not_installed(names: Sequence[str]) -> list[str]:
    """The modules that cannot be found."""
    return [name for name in names if not is_installed(name)]


def is_installed(name: str) -> bool:
    """Whether a module can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # it is blocked
        return False


def written_files(model: Any, teacher: Teacher, format: str, calibration: np.ndarray | None = None) -> dict[str, bytes]:
    """The contents of the files of a converted network, by name or suffix; of its int8 form with calibration images."""
    kind = FORMATS[format]
    about = metadata.texts(teacher, format=format, precision="float32", **dict(kind.notes))
    if calibration is None:
        return kind.write(model, about)
    assert kind.quantise is not None
    return kind.write(kind.quantise(model, calibration), {**about, "precision": "int8"})


def num_bytes(files: Mapping[str, bytes]) -> int:
    """The size of all files together."""
    return sum(map(len, files.values()))


def measured(
    run: Run, teacher: Teacher, test: Sequence[Batch] | None, head: Head, runtime: Runtime
) -> tuple[float | None, float | None]:
    """Accuracies on the test batches: of the file, and of the network."""
    if test is None:
        return None, None
    pairs = ((batch, images.normalised(teacher, batch.images)) for batch in test)
    return comparison.accuracy(run, pairs, head), evaluation.accuracy(teacher.network, test, runtime, head)


def warning_of(compared: comparison.Comparison, is_int8: bool) -> str | None:
    """What the user should look at."""
    if not is_int8 or compared.agreement >= comparison.AIM_INT8:
        return None
    return (
        f"the int8 file answers differently on {100 * (1 - compared.agreement):.1f} % of the images (aim: at most "
        f"{100 * (1 - comparison.AIM_INT8):.0f} %); measure its accuracy on test data before you use it"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and messages of the exporters, which are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
