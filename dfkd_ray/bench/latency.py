"""Benchmark of latency: seconds per batch of a teacher and its students, on the runtimes that are here.

All networks run in turn, in the same process and on the same images; a ratio is of medians of alternating runs. The
images are noise, because the costs do not depend on their content.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import devices, exporting
from dfkd_ray.bench.recipe import synchronise
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import operations, pruning
from dfkd_ray.exporting import int8, onnx_files
from dfkd_ray.text import one_line

CPU = torch.device("cpu")
BATCHES = (1, 32)
NUM_WARMING = 3  # batches before a first timed one
LEAST_S = 0.05  # of one run: several batches, if one is shorter
NAME = 34  # columns for a network's name
FASTER = 1.05  # below this ratio a student is not called faster

Run = Callable[[], Any]


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
class Latency:
    """One network in one setting. `ratio`: the teacher's median over its own; `low`, `high`: quartiles of ratios."""

    network: str
    setting: Setting
    seconds: float
    ratio: float
    low: float
    high: float

    def line(self) -> str:
        """For the terminal."""
        text = f"  {self.network:<{NAME}}{1e3 * self.seconds:9.3f} ms"
        return text + f"{self.ratio:7.2f} x  ({self.low:.2f} to {self.high:.2f})"


def run(networks: Sequence[Teacher], *, repeats: int = 15, with_int8: bool = False) -> list[Latency]:
    """Measure and print; the first network is the teacher. `with_int8`: also each network in int8, on ONNX Runtime.

    `ValueError` for networks that take other images than the first, or without ONNX Runtime where int8 is wanted.
    """
    shape = networks[0].info.input_shape
    for other in networks:
        if other.info.input_shape != shape:
            given, own = ("x".join(map(str, each)) for each in (other.info.input_shape, shape))
            raise ValueError(f"{other.name} takes images of {given}, {networks[0].name} of {own}: expected the same")
    missing = exporting.not_installed(exporting.ONNX)
    if missing and with_int8:
        raise ValueError(f"`int8` needs {', '.join(missing)}, not installed here: pip install 'dfkd_ray[onnx]'")
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
    found: list[Latency] = []
    for setting in settings(bool(models)):
        # An ONNX Runtime session takes PyTorch's number of threads.
        on_cpu = devices.numerics("float32", CPU, setting.num_threads) if setting.num_threads else nullcontext()
        with on_cpu:
            sides = sides_of(setting, networks, names, models)
            measured = compare(setting, sides, repeats)
        print(f"{setting}:")
        for row in measured:
            print(row.line(), flush=True)
        found += measured
    for line in not_faster(found, names[0]):
        print(line)
    return found


def not_faster(found: Sequence[Latency], teacher: str) -> list[str]:
    """A line for each other network that is not faster in every setting."""
    lines = []
    for name in dict.fromkeys(each.network for each in found if each.network != teacher):
        own = [each for each in found if each.network == name]
        slow = sum(each.ratio < FASTER for each in own)
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
                images = noise(each, 64).numpy()
                models[f"{name}, int8"] = int8.quantised(models[name], images)
    return models


def noise(teacher: Teacher, num_images: int) -> Tensor:
    """Normalised images (num_images, *input_shape)."""
    return torch.randn(num_images, *teacher.info.input_shape, generator=torch.Generator().manual_seed(0))


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
    images = noise(networks[0], setting.batch_size)
    if setting.runtime == "ONNX Runtime":
        batch = images.numpy()

        def opened(model: bytes) -> Run:
            call = onnx_files.runs(onnx_files.session(model, spinning=False))
            return lambda: call(batch)

        return {name: opened(model) for name, model in models.items()}
    device = torch.device("cuda") if setting.num_threads is None else CPU

    def placed(network: nn.Module) -> Run:
        own = devices.place(deepcopy(network).eval(), device)
        given = devices.laid_out(images.to(device), own)

        @torch.no_grad()
        def call() -> None:
            own(given)
            synchronise(device)

        return call

    return {name: placed(each.network) for name, each in zip(names, networks, strict=True)}


def compare(setting: Setting, sides: dict[str, Run], repeats: int) -> list[Latency]:
    """Medians and ratios of all sides, which run in turn; the first one is the teacher."""
    counts = {name: num_batches(call) for name, call in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name])
    first = next(iter(times.values()))
    found = []
    for name, own in times.items():
        ratios = [teacher / student for teacher, student in zip(first, own, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        median = statistics.median(own)
        ratio = statistics.median(first) / median
        found.append(Latency(name, setting, median, ratio, low, high))
    return found


def num_batches(call: Run) -> int:
    """Batches of one run, so that it takes `LEAST_S`; the first ones warm up."""
    for _ in range(NUM_WARMING):
        call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return max(1, round(LEAST_S / max(seconds, 1e-6)))
