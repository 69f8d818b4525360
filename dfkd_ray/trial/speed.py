"""Latency in a trial: of its student against the teacher, and of smaller networks while channels are chosen."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import devices, exporting, latency
from dfkd_ray.config import LatencyConfig
from dfkd_ray.exporting import onnx_files
from dfkd_ray.exporting.onnx_files import Written
from dfkd_ray.latency import Latency, Run

CPU = torch.device("cpu")
STUDENT, INT8 = "latency_ratio", "int8_latency_ratio"  # the columns of ratios
COLUMNS = (STUDENT, INT8, "latency_s", "teacher_latency_s", "latency_warning")
TEACHER = "teacher"  # the first side of each comparison


def check(config: LatencyConfig) -> None:
    """`ValueError` without the packages that measuring needs."""
    if config.runtime == "onnxruntime":
        exporting.check_installed("latency.runtime=onnxruntime", instead=", or set latency.runtime=pytorch")


def columns(
    config: LatencyConfig,
    teacher: nn.Module,
    student: nn.Module | None,
    files: Written | None,
    input_shape: Sequence[int],
    device: torch.device,
) -> dict[str, Any]:
    """The columns of a row; null for what is not measured.

    `student`: None in the teacher's shape. `files`: its ONNX files, if it was written in int8, which is compared with
    the teacher in float32 on ONNX Runtime. What ONNX cannot hold is a warning: no student is lost by it.
    """
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    warned: list[str] = []
    if config.runtime == "none":
        return found
    with devices.numerics("float32", device, config.num_threads):
        try:
            for sides in comparisons(config, teacher, student, files, input_shape, device):
                timed = latency.compared(sides, config.repeats)
                for name in timed.keys() - {TEACHER}:
                    found[name] = timed[name].ratio
                    warned += doubts(name, timed[name])
                if STUDENT in timed:
                    found |= {"latency_s": timed[STUDENT].seconds, "teacher_latency_s": timed[TEACHER].seconds}
                    if timed[STUDENT].ratio < latency.FASTER:
                        warned.append(f"the student is not faster than the teacher here ({said(config)})")
        except ValueError as error:
            warned.append(f"the latency is not measured: {error}")
    return found | {"latency_warning": "; ".join(warned) or None}


def comparisons(
    config: LatencyConfig,
    teacher: nn.Module,
    student: nn.Module | None,
    files: Written | None,
    input_shape: Sequence[int],
    device: torch.device,
) -> Iterator[dict[str, Run]]:
    """What runs side by side: with PyTorch, then with ONNX Runtime. Sides have the names of their columns."""
    images = latency.noise(input_shape, config.batch_size)
    if student is not None and config.runtime == "pytorch":
        yield {TEACHER: latency.running(teacher, images, device), STUDENT: latency.running(student, images, device)}
    sides: dict[str, Run] = {}
    if student is not None and config.runtime == "onnxruntime":
        sides[STUDENT] = onnx_run(student, images, None if files is None else files.float32)
    if files is not None:
        sides[INT8] = onnx_files.running(files.int8, images.numpy())
    if sides:
        yield {TEACHER: onnx_run(teacher, images), **sides}


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
    """What measures the share of the teacher's seconds per batch that a network saves.

    `ValueError` if ONNX is wanted and cannot hold one of them.
    """

    def measure(network: nn.Module) -> float:
        with devices.numerics("float32", device, config.num_threads):
            (sides,) = comparisons(config, teacher, network, None, input_shape, device)
            return 1 - 1 / latency.compared(sides, config.repeats)[STUDENT].ratio

    return measure


def onnx_run(network: nn.Module, images: Tensor, model: bytes | None = None) -> Run:
    """What runs one batch with ONNX Runtime: through a network's model, which is made if it is not given."""
    if model is None:
        own = devices.place(deepcopy(network).eval(), CPU, channels_last=False)
        with exporting.quiet():
            model = onnx_files.converted(own, tuple(images.shape[1:]))
    return onnx_files.running(model, images.numpy())
