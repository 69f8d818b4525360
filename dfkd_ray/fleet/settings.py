"""The settings of a fleet: number of synthesizers, reservations, prefetch window, timeouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dfkd_ray.fleet.synthesizer import Synthesizer


@dataclass(frozen=True)
class Settings:
    """The settings of a fleet; Ray restarts its coordinator with the same ones."""

    num_synthesizers: int  # in the placement group; others may be added
    cpus: float  # reserved by each of those
    gpus: float = 0.0  # reserved by each, added ones included
    cache_root: str | None = None
    device: str = "auto"
    most: int | Literal["auto"] | None = None
    """Largest number of synthesizers; more are added while batches are waited for. "auto": as many as the machines that
    are alive have room for. None: none are added."""
    added_cpus: float = 0.0  # reserved by each added one; 0 with "auto"
    idle_s: float = 60.0  # after which an added one of a range is removed
    threads: int = 1  # of one synthesizer; "auto" divides the cores by it
    trial_gpus: float = 0.0  # GPUs that a trial reserves; "auto" leaves room for them
    window: int = 4  # batches made ahead of a reader; at least two per slot
    budget_bytes: int = 256 << 20  # of batches kept in memory; the others are in the cache
    batch_timeout_s: float = 3600.0  # a synthesizer that takes longer is killed
    placement_group: Any = None  # set when the fleet is started
    slots: int = 1  # batches that one synthesizer makes at the same time
    make: Callable[..., Any] = Synthesizer
