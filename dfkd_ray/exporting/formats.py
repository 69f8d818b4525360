"""The table of formats: how each converts a network, writes, opens and reads its files, and what it needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dfkd_ray.bundles import Teacher
from dfkd_ray.exporting import bundle_files, int8, onnx_files, torch_files
from dfkd_ray.exporting.comparison import Run


@dataclass(frozen=True)
class Format:
    """A format of files.

    `convert`: a teacher, its network in eval mode → a model. `quantise`: model, calibration images → an int8 model.
    `write`: model, metadata → content by file name, or by suffix where `suffix` is the main file's; "" means a folder.
    `open`: the main file, or the folder → a function from images to logits. `read` → its metadata. `round`: a teacher →
    a copy with float16 values.
    """

    what: str
    suffix: str
    extra: str | None
    needs: tuple[str, ...]
    convert: Callable[[Teacher], Any]
    write: Callable[[Any, Mapping[str, str]], dict[str, bytes]]
    open: Callable[[Path], Run]
    read: Callable[[Path], dict[str, str]]
    quantise: Callable[[Any, np.ndarray], Any] | None = None
    notes: tuple[tuple[str, Any], ...] = ()
    round: Callable[[Teacher], Teacher] | None = None


def of_network(convert: Callable[[nn.Module, Sequence[int]], Any]) -> Callable[[Teacher], Any]:
    """`convert` of a format that needs the network and the shape of its input alone."""
    return lambda teacher: convert(teacher.network, teacher.info.input_shape)


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    "onnx": Format(
        "one file for ONNX Runtime and others",
        ".onnx",
        "onnx",
        ONNX,
        of_network(onnx_files.converted),
        onnx_files.files,
        onnx_files.open_model,
        onnx_files.read,
        int8.quantised,
        (("opset", onnx_files.OPSET),),
    ),
    "torch-export": Format(
        "one file for torch.export.load",
        ".pt2",
        None,
        (),
        of_network(torch_files.program),
        torch_files.program_files,
        torch_files.open_program,
        torch_files.read_program,
    ),
    "openvino": Format(
        "an .xml file, with a .bin beside it",
        ".xml",
        "openvino",
        ("openvino", *ONNX),
        of_network(onnx_files.converted),
        onnx_files.openvino_files,
        onnx_files.open_openvino,
        onnx_files.read_openvino,
        int8.quantised,
    ),
    "torch": Format(
        "a folder with readable source code and weights for PyTorch alone",
        "",
        None,
        (),
        of_network(torch_files.traced),
        torch_files.source_files,
        torch_files.open_source,
        torch_files.read_source,
    ),
    "bundle": Format(
        "a folder for this package",
        "",
        None,
        (),
        bundle_files.converted,
        bundle_files.files,
        bundle_files.open_bundle,
        bundle_files.read,
        round=bundle_files.rounded,
    ),
}
