"""Benchmark of latency: seconds per batch of a teacher and its students, on the runtimes that are here.

The measuring is `dfkd_ray.latency`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from dfkd_ray import devices, exporting, latency
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import operations, pruning
from dfkd_ray.exporting import int8, onnx_files
from dfkd_ray.latency import Latency, Run
from dfkd_ray.results.measurements import Interval, Row
from dfkd_ray.text import one_line

CPU = torch.device("cpu")
BATCHES = (1, 32)
NAME = 34  # columns for a network's name


@dataclass(frozen=True)
class Setting:
    """A runtime, its threads (None on a GPU) and a batch size."""

    runtime: str
    num_threads: int | None
    batch_size: int

    def __str__(self) -> str:
        threads = "" if self.num_threads is None else f", {self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.runtime}{threads}, batch {self.batch_size}"


@dataclass(frozen=True)
class Measured:
    """One network in one setting, against the first network in it."""

    network: str
    setting: Setting
    latency: Latency

    def line(self) -> str:
        """For the terminal."""
        own = self.latency
        text = f"  {self.network:<{NAME}}{1e3 * own.seconds:9.3f} ms"
        return text + f"{own.ratio:7.2f} x  ({own.low:.2f} to {own.high:.2f})"

    def row(self) -> Row:
        """For a file of measurements."""
        own, labels = self.latency, {"network": self.network, "runtime": self.setting.runtime}
        labels |= {"threads": self.setting.num_threads or 0, "batch_size": self.setting.batch_size}
        return Row(labels, {"ratio": Interval(own.ratio, own.low, own.high), "seconds": own.seconds})


def run(networks: Sequence[Teacher], *, repeats: int = 15, with_int8: bool = False) -> list[Measured]:
    """Measure and print; the first network is the teacher. `with_int8`: also each network in int8, on ONNX Runtime.

    `ValueError` for networks that take other images than the first, or without ONNX Runtime where int8 is wanted.
    """
    shape = networks[0].info.input_shape
    for other in networks:
        if other.info.input_shape != shape:
            given, own = ("x".join(map(str, each)) for each in (other.info.input_shape, shape))
            raise ValueError(f"{other.name} takes images of {given}, {networks[0].name} of {own}: expected the same")
    missing = exporting.not_installed(exporting.ONNX)
    if with_int8:
        exporting.check_installed("`int8`")
    names = distinct([each.name for each in networks])
    models = {} if missing else onnx_models(networks, names, with_int8)
    print(f"{'':<{NAME + 2}}{'parameters':>12}{'MACs':>14}{'ONNX bytes':>14}")
    for name, each in zip(names, networks, strict=True):
        size = f"{len(models[name]):,}" if name in models else "-"
        macs = operations.num_macs(each.network, each.info.image_shape)
        parameters = pruning.num_parameters(each.network)
        print(f"  {name:<{NAME}}{parameters:12,}{macs:14,}{size:>14}")
    if missing:
        print(f"ONNX Runtime is left out: {', '.join(missing)} not installed (pip install 'dfkd_ray[onnx]')")
    print(f"median of {repeats} alternating runs; ratio to the first (middle half of the ratios)")
    found: list[Measured] = []
    for setting in settings(bool(models)):
        # An ONNX Runtime session takes PyTorch's number of threads.
        on_cpu = devices.numerics("float32", CPU, setting.num_threads) if setting.num_threads else nullcontext()
        with on_cpu:
            sides = sides_of(setting, networks, names, models)
            timed = latency.compared(sides, repeats)
        measured = [Measured(name, setting, own) for name, own in timed.items()]
        print(f"{setting}:")
        for row in measured:
            print(row.line(), flush=True)
        found += measured
    for line in not_faster(found, names[0]):
        print(line)
    return found


def not_faster(found: Sequence[Measured], teacher: str) -> list[str]:
    """A line for each other network that is not faster in every setting."""
    lines = []
    for name in dict.fromkeys(each.network for each in found if each.network != teacher):
        own = [each for each in found if each.network == name]
        slow = sum(each.latency.ratio < latency.FASTER for each in own)
        if slow:
            lines.append(f"not faster than the first in {slow} of {len(own)} settings: {name}")
    return lines


def distinct(names: Sequence[str]) -> list[str]:
    """Short names: the ends of long ones, with a number where two would be the same."""
    ends = [one_line(name, 1000) for name in names]
    ends = [end if len(end) <= NAME - 10 else f"…{end[11 - NAME :]}" for end in ends]
    return [f"{end} ({ends[:i].count(end) + 1})" if end in ends[:i] else end for i, end in enumerate(ends)]


def onnx_models(networks: Sequence[Teacher], names: Sequence[str], with_int8: bool) -> dict[str, bytes]:
    """The networks as ONNX models, by name."""
    models: dict[str, bytes] = {}
    with exporting.quiet():
        for name, each in zip(names, networks, strict=True):
            models[name] = onnx_files.converted(each.network, each.info.input_shape)
            if with_int8:
                images = latency.noise(each.info.input_shape, 64).numpy()
                models[f"{name}, int8"] = int8.quantised(models[name], images)
    return models


def settings(with_onnx: bool) -> Iterator[Setting]:
    """Runtimes, one and all threads, batch sizes; a GPU where there is one."""
    cores = len(os.sched_getaffinity(0))
    for runtime in ("ONNX Runtime", "PyTorch") if with_onnx else ("PyTorch",):
        for num_threads in dict.fromkeys((1, cores)):
            for batch_size in BATCHES:
                yield Setting(runtime, num_threads, batch_size)
    if torch.cuda.is_available():
        for batch_size in BATCHES:
            yield Setting("PyTorch, CUDA", None, batch_size)


def sides_of(
    setting: Setting, networks: Sequence[Teacher], names: Sequence[str], models: dict[str, bytes]
) -> dict[str, Run]:
    """What runs one batch of each network, by name."""
    images = latency.noise(networks[0].info.input_shape, setting.batch_size)
    if setting.runtime == "ONNX Runtime":
        return {name: onnx_files.running(model, images.numpy()) for name, model in models.items()}
    device = torch.device("cuda") if setting.num_threads is None else CPU
    return {name: latency.running(each.network, images, device) for name, each in zip(names, networks, strict=True)}
