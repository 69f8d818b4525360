"""The table of formats: how each converts a network, writes, opens and reads its files, and what it needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dfkd_ray.exporting import int8, onnx_files, torch_files
from dfkd_ray.exporting.comparison import Run


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
        int8.quantised,
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
        int8.quantised,
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
