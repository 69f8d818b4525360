"""Seconds per batch of networks that run in turn, in one process and on the same images.

A ratio is of the medians of alternating runs: what else runs on the machine slows all of them alike. The images are
noise, because the costs do not depend on their content.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfkd_ray import devices

NUM_WARMING = 3  # batches before a first timed one
FASTER = 1.05  # below this ratio a network is not called faster
LEAST_S = 0.05  # of one run: several batches, if one is shorter

Run = Callable[[], Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Latency:
    """Median seconds per batch. `ratio`: the first one's median over it; `low`, `high`: quartiles of the ratios."""

    seconds: float
    ratio: float
    low: float
    high: float


def compared(sides: Mapping[Name, Run], repeats: int) -> dict[Name, Latency]:
    """Run all sides in turn, `repeats` times. Ratios are to the first side: above 1 is faster than it."""
    counts = {name: num_batches(call) for name, call in sides.items()}
    times: dict[Name, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name])
    first = next(iter(times.values()))
    found = {}
    for name, own in times.items():
        ratios = [one / other for one, other in zip(first, own, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        median = statistics.median(own)
        found[name] = Latency(median, statistics.median(first) / median, low, high)
    return found


def num_batches(call: Run) -> int:
    """Batches of one run, so that it takes `LEAST_S`; the first ones warm up."""
    for _ in range(NUM_WARMING):
        call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return max(1, round(LEAST_S / max(seconds, 1e-6)))


def noise(input_shape: Sequence[int], num_images: int) -> Tensor:
    """Normalised images (num_images, *input_shape)."""
    return torch.randn(num_images, *input_shape, generator=torch.Generator().manual_seed(0))


def running(network: nn.Module, images: Tensor, device: torch.device) -> Run:
    """What runs one batch through a copy of a network with PyTorch, and waits for the result."""
    own = devices.place(deepcopy(network).eval(), device)
    given = devices.laid_out(images.to(device), own)

    @torch.no_grad()
    def call() -> None:
        own(given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
