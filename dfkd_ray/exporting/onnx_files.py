"""ONNX files, written by PyTorch's exporter and run by ONNX Runtime; OpenVINO's files, made from them.

Opset 21: with ONNX Runtime 1.32, opsets 18 to 25 give the same fused kernels and the same speed (bundled ResNet-20,
float32 and int8), and older runtimes refuse newer opsets. BatchNorm is folded into convolutions by the exporter.
"""

import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkd_ray.exporting import source_code, torch_files
from dfkd_ray.exporting.comparison import Run
from dfkd_ray.exporting.metadata import INPUT, OUTPUT
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import reason, size

OPSET = 21
PRODUCER = "dfkd_ray"
PREFIX = f"{PRODUCER}."  # of metadata names
MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)', overload=")
MAX_BYTES = 2**31 - 2**20  # an ONNX file is one protobuf message, of less than 2 GiB


@dataclass(frozen=True)
class Written:
    """A network's ONNX files, as bytes."""

    float32: bytes
    int8: bytes


def converted(network: nn.Module, input_shape: Sequence[int]) -> bytes:
    """The network as an ONNX model. `ValueError` with the exporter's reason if it cannot be written."""
    num_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise ValueError(f"the network has {size(num_bytes)} of weights, and one ONNX file holds at most 2.1 GB")
    exported = torch_files.program(network, input_shape)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    try:
        made = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False, external_data=False, **names
        )
    except Exception as error:
        why = unsupported(exported, cause(error)) or reason(cause(error), 200)
        raise ValueError(f"the network cannot be written as ONNX: {why}") from error
    assert made is not None
    model = made.model_proto
    tidy(model)
    return model.SerializeToString()


def cause(error: BaseException) -> BaseException:
    """The exception that began a chain: the exporter's own says only that it failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def unsupported(exported: Any, error: BaseException) -> str | None:
    """Which operator ONNX lacks, by the exporter's error, and which module uses it; None for another error."""
    found = MISSING.search(str(error))
    if found is None:
        return None
    # The exporter takes operators apart, and names a part: prims.bessel_j0 of aten.special_bessel_j0.
    base = found[1].rpartition(".")[2]
    nodes = [node for node in exported.graph.nodes if operator_name(node).endswith(base)]
    where = source_code.module_of(nodes[0]) if nodes else "a module of it"
    return f"{where} uses the operator {one_line(found[1], 60)}, for which ONNX has no counterpart"


def operator_name(node: Any) -> str:
    """The name of the operator that a node calls, without namespace and overload; empty for other nodes."""
    return str(node.target).split(".")[1] if node.op == "call_function" and str(node.target).count(".") == 2 else ""


def tidy(model: Any) -> None:
    """Name the free dimension, and remove stack traces, which hold paths of this machine."""
    graph = model.graph
    dims = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input}
    assert len(dims) == 1 and all(dims), "the batch size is not free"
    own = dims.pop()
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == own:
                dim.dim_param = "batch"
        del value.metadata_props[:]
    for part in (graph, *graph.node, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    model.doc_string = ""


def files(model: bytes, texts: Mapping[str, str]) -> dict[str, bytes]:
    """The model with metadata."""
    import onnx

    found = onnx.load_model_from_string(model)
    onnx.helper.set_model_props(found, {PREFIX + name: text for name, text in texts.items()})
    found.producer_name, found.producer_version = PRODUCER, texts["package_version"]
    return {".onnx": found.SerializeToString(deterministic=True)}


def open_model(path: Path) -> Run:
    """Runs a file with ONNX Runtime on the CPU."""
    return runs(session(path.read_bytes()))


def runs(opened: Any) -> Run:
    """An ONNX Runtime session as a function of images."""
    return lambda images: opened.run([OUTPUT], {INPUT: images})[0]


def run_of(model: bytes) -> Run:
    """A model as a function of images. Its threads do not wait in loops: others on the machine need the time."""
    return runs(session(model, spinning=False))


def running(model: bytes, batch: np.ndarray) -> Callable[[], np.ndarray]:
    """What runs one batch through a model, for the measuring of latency."""
    call = run_of(model)
    return lambda: call(batch)


def session(model: bytes, spinning: bool = True) -> Any:
    """An ONNX Runtime session on the CPU; it writes nothing to the terminal but errors.

    `spinning`: whether its threads wait in loops for the next batch, which takes time from other sessions.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def read(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    import onnx

    found = onnx.load(path).metadata_props
    return {prop.key.removeprefix(PREFIX): prop.value for prop in found if prop.key.startswith(PREFIX)}


def openvino_files(model: bytes, texts: Mapping[str, str]) -> dict[str, bytes]:
    """OpenVINO's two files, weights in the model's own precision."""
    import openvino

    found = openvino.Core().read_model(io.BytesIO(model))
    for name, text in texts.items():
        found.set_rt_info(text, ["dfkd_ray", name])
    with tempfile.TemporaryDirectory(prefix="dfkd_ray-export-") as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(found, path, compress_to_fp16=False)
        return {kind: path.with_suffix(kind).read_bytes() for kind in (".bin", ".xml")}


def open_openvino(path: Path) -> Run:
    """Runs OpenVINO's files on the CPU, in float32: by itself it takes bfloat16 where the CPU has it."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    opened = openvino.Core().compile_model(path, "CPU", options)
    return lambda images: np.array(opened([images])[0])


def read_openvino(path: Path) -> dict[str, str]:
    """The metadata of OpenVINO's files."""
    import openvino

    found: Any = openvino.Core().read_model(path).get_rt_info()["dfkd_ray"]
    return {name: value.astype(str) for name, value in found.items()}
