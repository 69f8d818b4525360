"""Writes a trained network for programs without this package: ONNX, torch.export, OpenVINO, or PyTorch source code.

`FORMATS` has a row per format. The common path is in `export`: convert the network, write the files beside their place,
run them on images and compare the logits with the network's, and only then rename them to their place.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkd_ray import bundles, evaluation, storage, targets
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher
from dfkd_ray.devices import Runtime
from dfkd_ray.exporting import comparison, images, metadata, onnx_files, torch_files
from dfkd_ray.exporting import int8 as quantisation
from dfkd_ray.exporting.comparison import Run
from dfkd_ray.exporting.images import Progress
from dfkd_ray.exporting.onnx_files import PRODUCER
from dfkd_ray.heads import HEADS, Head
from dfkd_ray.plain import given, named
from dfkd_ray.storage import Where

CPU, DEVICES = torch.device("cpu"), ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Format:
    """A format of files.

    `convert`: network in eval mode, input shape → a model. `quantise`: model, calibration images → an int8 model.
    `write`: model, metadata → content by file name, or by suffix where `suffix` is the main file's; "" means a folder.
    `open`: the main file, or the folder → a function from images to logits. `read` → its metadata.
    """

    what: str
    suffix: str
    extra: str | None
    needs: tuple[str, ...]
    convert: Callable[[nn.Module, Sequence[int]], Any]
    write: Callable[[Any, Mapping[str, str]], dict[str, bytes]]
    open: Callable[[Path], Run]
    read: Callable[[Path], dict[str, str]]
    quantise: Callable[[Any, np.ndarray], Any] | None = None
    notes: tuple[tuple[str, Any], ...] = ()


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    "onnx": Format(
        "one file for ONNX Runtime and others",
        ".onnx",
        "onnx",
        ONNX,
        onnx_files.converted,
        onnx_files.files,
        onnx_files.open_model,
        onnx_files.read,
        quantisation.quantised,
        (("opset", onnx_files.OPSET),),
    ),
    "torch-export": Format(
        "one file for torch.export.load",
        ".pt2",
        None,
        (),
        torch_files.program,
        torch_files.program_files,
        torch_files.open_program,
        torch_files.read_program,
    ),
    "openvino": Format(
        "an .xml file, with a .bin beside it",
        ".xml",
        "openvino",
        ("openvino", *ONNX),
        onnx_files.converted,
        onnx_files.openvino_files,
        onnx_files.open_openvino,
        onnx_files.read_openvino,
        quantisation.quantised,
    ),
    "torch": Format(
        "a folder with readable source code and weights for PyTorch alone",
        "",
        None,
        (),
        torch_files.traced,
        torch_files.source_files,
        torch_files.open_source,
        torch_files.read_source,
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the network.

    `size_bytes` is of all files, `float32_bytes` what the same format takes without int8, `dense_bytes` the network's
    tensors in float32. `comparison` is on images that are not data (`images` says where they are from). Accuracies, in
    [0, 1], are None without test batches. `warning`: what to look at, or None.
    """

    path: Path
    format: str
    is_int8: bool
    size_bytes: int
    float32_bytes: int
    dense_bytes: int
    images: str
    comparison: comparison.Comparison
    accuracy: float | None = None
    network_accuracy: float | None = None
    warning: str | None = None


def export(
    network: Teacher | str | Path,
    path: Path | str,
    *,
    format: str = "onnx",
    int8: bool = False,
    test: Sequence[Batch] | None = None,
    trust_code: Sequence[str] | str = (),
    download: bool = False,
    device: str = "auto",
    cache_root: Where | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a network in a format of `FORMATS`, run what was written, and keep it if it is the network.

    `network`: a bundle's folder, URI or name, a library's network by name, or a `Teacher` (`Teacher.from_network` makes
    one from a module in memory). The file takes normalised images in batches of any size. `int8` quantises weights and
    activations, on synthetic images. `test`: test batches, for reporting only. `device` and `cache_root`: where the
    synthetic images are made and kept.

    `ValueError` for wrong arguments, a target that exists, a missing extra, or a network that the format cannot hold;
    `FloatingPointError` if the written file does not compute what the network computes. Then nothing is left behind.
    """
    path = check(path, format, int8, device)
    if isinstance(network, nn.Module):
        raise ValueError(
            "network is an nn.Module: make a teacher of it with `Teacher.from_network`, which describes it"
        )
    teacher = network if isinstance(network, Teacher) else bundles.load(network, trust_code, download=download)
    info, head, row = teacher.info, HEADS[teacher.info.head], FORMATS[format]
    evaluation.check_test(test or (), info.image_shape, info.num_classes, head)
    if test is not None and not any(len(batch.labels) for batch in test):
        raise ValueError("the test set has no images")
    made = images.made(teacher, int8, cache_root, device, progress)
    with quiet():
        runtime = Runtime(CPU, info.space)
        expected = torch_files.runs(teacher.network)(made.compared)
        if not np.isfinite(expected).all():
            raise ValueError(
                f"{teacher.name}: its logits on synthetic images are not finite numbers; nothing to compare"
            )
        files, float32_bytes = converted(teacher, row, format, made.calibration if int8 else None)
        with beside(path, row, files) as written:
            run = row.open(written)
            compared = comparison.compared(run, made.compared, expected, head, int8)
            accuracies = measured(run, teacher, test, head, runtime)
    return Exported(
        path=path,
        format=format,
        is_int8=int8,
        size_bytes=num_bytes(files),
        float32_bytes=float32_bytes,
        dense_bytes=sum(4 * tensor.numel() for tensor in teacher.network.state_dict().values()),
        images=made.source,
        comparison=compared,
        accuracy=accuracies[0],
        network_accuracy=accuracies[1],
        warning=warning_of(compared, int8),
    )


def check(path: Path | str, format: str, int8: bool, device: str = "auto") -> Path:
    """The path, if a format may be written there; else `ValueError` (one line), before any work."""
    if format not in FORMATS:
        raise ValueError(f"`format={given(format)}`: expected one of {', '.join(FORMATS)}")
    if device not in DEVICES:
        raise ValueError(f"`device={given(device)}`: expected {', '.join(DEVICES)}")
    row, path = FORMATS[format], Path(os.path.abspath(os.path.expanduser(path)))
    if int8 and row.quantise is None:
        able = " or ".join(name for name, each in FORMATS.items() if each.quantise)
        raise ValueError(f"`int8` goes with format {able}, not with {format}")
    missing = not_installed(row.needs)
    if missing:
        raise ValueError(
            f"format {format} needs {', '.join(missing)}, not installed here: pip install 'dfkd_ray[{row.extra}]'"
        )
    if row.suffix and path.suffix != row.suffix:
        raise ValueError(f"{named(path)}: format {format} is {row.what}; expected a name that ends in {row.suffix}")
    targets.refuse_no_folder(path.parent)
    if not row.suffix:
        targets.refuse_shared(path)
    for place in places(path, row):
        if os.path.lexists(place) and not (not row.suffix and is_empty_folder(place)):
            raise ValueError(f"{named(place)}: it is there already, and is not replaced; choose another name")
    return path


def is_own_onnx(data: bytes) -> bool:
    """Whether the beginning of a file is that of an ONNX file which this package wrote: it names its producer."""
    return PRODUCER.encode() in data[:32]


def not_installed(names: Sequence[str]) -> list[str]:
    """The modules that cannot be found."""
    return [name for name in names if not is_installed(name)]


def is_installed(name: str) -> bool:
    """Whether a module can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # it is blocked
        return False


def places(path: Path, row: Format) -> list[Path]:
    """All paths that a format writes: the main file or folder last."""
    return [path.with_suffix(".bin"), path] if row.suffix == ".xml" else [path]


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder with nothing in it but leftovers of our killed writes."""
    return path.is_dir() and not path.is_symlink() and not targets.contents(storage.folder(path))


def converted(
    teacher: Teacher, row: Format, format: str, calibration: np.ndarray | None
) -> tuple[dict[str, bytes], int]:
    """The contents of the files, by name or suffix; and the size of the float32 ones in bytes."""
    model = row.convert(teacher.network, teacher.info.input_shape)
    about = metadata.texts(teacher, format=format, precision="float32", **dict(row.notes))
    files = row.write(model, about)
    size = num_bytes(files)
    if calibration is not None:
        assert row.quantise is not None
        files = row.write(row.quantise(model, calibration), {**about, "precision": "int8"})
    return files, size


def num_bytes(files: Mapping[str, bytes]) -> int:
    """The size of all files together."""
    return sum(map(len, files.values()))


@contextlib.contextmanager
def beside(path: Path, row: Format, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write files under a hidden name beside their place; at the end of the block they are renamed to it.

    If the block raises, or the disk is full, nothing is left. Yields the main file or the folder.
    """
    new = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        own = files if not row.suffix else {path.stem + suffix: data for suffix, data in files.items()}
        storage.write_files(partial, {name: [data] for name, data in own.items()})
        yield partial / path.name if row.suffix else partial
        if row.suffix:
            keep(partial, places(path, row))
        else:
            partial.chmod(0o755)
            os.replace(partial, path)  # an empty folder is replaced, another one is an error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in new:
                parent.rmdir()
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep(partial: Path, paths: Sequence[Path]) -> None:
    """Move files of a folder to their places: all or none. A file that is there meanwhile is not replaced."""
    kept: list[Path] = []
    try:
        for place in paths:
            try:
                os.link(partial / place.name, place)  # unlike a rename, it fails where there is something
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                if os.path.lexists(place):
                    raise
                os.rename(partial / place.name, place)
            kept.append(place)
    except BaseException:
        for place in kept:
            place.unlink(missing_ok=True)
        raise


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
