"""Seconds per batch of networks that run in turn, in one process and on the same images.

Each run of a network takes several batches, and its fastest one counts: the others may have been interrupted by what
else runs on the machine. A ratio is of the medians over alternating runs. The images are noise, because the costs do
not depend on their content.
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
LEAST_S, LEAST_BATCHES = 0.05, 3  # of one run
UNSURE = 1.5  # where the quartiles of the ratios are farther apart than this factor, a ratio is doubtful

Run = Callable[[], Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Latency:
    """Median seconds per batch. `ratio`: the first one's median over it; `low`, `high`: quartiles of the ratios."""

    seconds: float
    ratio: float
    low: float
    high: float

    @property
    def is_doubtful(self) -> bool:
        """Whether the machine was too busy for this ratio."""
        return self.high > UNSURE * self.low


def compared(sides: Mapping[Name, Run], repeats: int) -> dict[Name, Latency]:
    """Run all sides in turn, `repeats` times. Ratios are to the first side: above 1 is faster than it."""
    counts = {name: num_batches(call) for name, call in sides.items()}
    times: dict[Name, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            times[name].append(min(seconds(call) for _ in range(counts[name])))
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
    return max(LEAST_BATCHES, round(LEAST_S / max(seconds(call), 1e-6)))


def seconds(call: Run) -> float:
    """How long one batch takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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
