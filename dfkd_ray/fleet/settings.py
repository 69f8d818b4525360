"""What a fleet is started with: how many synthesizers, what each reserves, how far ahead and how long they work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dfkd_ray.fleet.synthesizer import Synthesizer


@dataclass(frozen=True)
class Settings:
    """Of a fleet; its coordinator is restarted with the same."""

    num_synthesizers: int  # each has a reservation; others may be added
    cpus: float  # that each of those reserves
    gpus: float = 0.0  # the same, of added ones too
    cache_root: str | None = None
    device: str = "auto"
    most: int | Literal["auto"] | None = None
    """While batches are waited for synthesizers are added, up to so many in all. "auto": up to as many as there is room
    for on the machines that are alive at the time. None: never."""
    added_cpus: float = 0.0  # that each added one reserves; none with "auto"
    idle_s: float = 60.0  # after which the added ones of a range are removed again
    threads: int = 1  # of one synthesizer: what "auto" divides cores by
    trial_gpus: float = 0.0  # what a trial reserves of a GPU: "auto" leaves room for it
    window: int = 4  # batches ahead of a reader; at least two per slot
    budget_bytes: int = 256 << 20  # of references kept; what is beyond lives in the cache
    batch_timeout_s: float = 3600.0  # a batch that takes longer is taken from its synthesizer
    placement_group: Any = None  # of the reservations: made where the fleet is started
    slots: int = 1  # batches that one synthesizer makes at a time
    make: Callable[..., Any] = Synthesizer
