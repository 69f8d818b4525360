"""Latency in a trial: of its student against the teacher, and of smaller networks while channels are chosen."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import devices, exporting, latency
from dfkd_ray.config import LatencyConfig
from dfkd_ray.exporting import onnx_files
from dfkd_ray.latency import Latency, Run

CPU = torch.device("cpu")
COLUMNS = ("latency_s", "teacher_latency_s", "latency_ratio", "latency_warning")


def check(config: LatencyConfig) -> None:
    """`ValueError` without the packages that measuring needs."""
    missing = exporting.not_installed(exporting.ONNX) if config.runtime == "onnxruntime" else []
    if missing:
        raise ValueError(
            f"latency.runtime=onnxruntime needs {', '.join(missing)}, not installed here: pip install "
            "'dfkd_ray[onnx]', or set latency.runtime=pytorch"
        )


def columns(
    config: LatencyConfig, teacher: nn.Module, student: nn.Module, input_shape: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """The columns of a row; null if the config says so, or if ONNX cannot hold one of the networks."""
    if config.runtime == "none":
        return dict.fromkeys(COLUMNS)
    try:
        first, own = compared(config, [teacher, student], input_shape, device)
    except ValueError as error:  # the student is not lost by it
        return {**dict.fromkeys(COLUMNS), "latency_warning": f"the latency is not measured: {error}"}
    warned = doubts("latency_ratio", own)
    if own.ratio < latency.FASTER:
        warned.append(f"the student is not faster than the teacher here ({said(config)})")
    found = {"latency_s": own.seconds, "teacher_latency_s": first.seconds, "latency_ratio": own.ratio}
    return {**found, "latency_warning": "; ".join(warned) or None}


def add_int8(
    row: dict[str, Any], config: LatencyConfig, teacher: nn.Module, int8: bytes, input_shape: Sequence[int]
) -> None:
    """Add to a row how many times as fast an int8 file is as the teacher in float32, both on ONNX Runtime."""
    if config.runtime == "none":
        row["int8_latency_ratio"] = None
        return
    images = latency.noise(input_shape, config.batch_size)
    warned = [row.get("latency_warning")]
    try:
        with devices.numerics("float32", CPU, config.num_threads):
            sides = {"teacher": onnx_run(teacher, images), "int8": onnx_files.running(int8, images.numpy())}
            own = latency.compared(sides, config.repeats)["int8"]
    except ValueError as error:  # the teacher of another architecture is not one that ONNX can hold
        row["int8_latency_ratio"] = None
        warned.append(f"the latency of int8 is not measured: {error}")
    else:
        row["int8_latency_ratio"] = own.ratio
        warned += doubts("int8_latency_ratio", own)
    row["latency_warning"] = "; ".join(filter(None, warned)) or None


def doubts(column: str, own: Latency) -> list[str]:
    """The warning of a ratio that was measured on a machine too busy for it."""
    if not own.is_doubtful:
        return []
    return [
        f"{column} is doubtful: half of the runs gave {own.low:.2f} to {own.high:.2f}, the machine was busy; measure "
        "it again with the bench of latency"
    ]


def said(config: LatencyConfig) -> str:
    """Where the latency is measured, for a sentence."""
    runtime = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}[config.runtime]
    return f"{runtime}, batch {config.batch_size}, {config.num_threads} thread{'s' * (config.num_threads > 1)}"


def removed_seconds(
    config: LatencyConfig, teacher: nn.Module, input_shape: Sequence[int], device: torch.device
) -> Callable[[nn.Module], float]:
    """What measures the share of the teacher's seconds per batch that a network saves."""

    def measure(network: nn.Module) -> float:
        return 1 - 1 / compared(config, [teacher, network], input_shape, device)[1].ratio

    return measure


def compared(
    config: LatencyConfig, networks: Sequence[nn.Module], input_shape: Sequence[int], device: torch.device
) -> list[Latency]:
    """The latency of each network; ratios are to the first."""
    images = latency.noise(input_shape, config.batch_size)
    on = CPU if config.runtime == "onnxruntime" else device
    with devices.numerics("float32", on, config.num_threads):
        if config.runtime == "onnxruntime":
            sides = {number: onnx_run(network, images) for number, network in enumerate(networks)}
        else:
            sides = {number: latency.running(network, images, on) for number, network in enumerate(networks)}
        return list(latency.compared(sides, config.repeats).values())


def onnx_run(network: nn.Module, images: Tensor) -> Run:
    """What runs one batch through a copy of a network with ONNX Runtime."""
    own = devices.place(deepcopy(network).eval(), CPU, channels_last=False)
    with exporting.quiet():
        model = onnx_files.converted(own, tuple(images.shape[1:]))
    return onnx_files.running(model, images.numpy())
