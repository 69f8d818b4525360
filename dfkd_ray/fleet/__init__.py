"""Starts and stops the synthesis fleet: Ray actors that make each batch of a sweep once, for all trials to read.

`started` starts the fleet before Tune, outside Tune's reservations. A trial reads batches through `Fleet.stream()`. A
batch does not depend on the synthesizer that makes it, so a synthesizer, the coordinator or a node may die at any time.

This module does not import torch, so that the coordinator's process starts fast and stays small.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dfkd_ray.fleet.coordinator import MAX_TIMEOUTS, Coordinator
from dfkd_ray.fleet.placement import Node, Placement, added_cpus, first_machines, plan
from dfkd_ray.fleet.session import QUIET, connected, nodes
from dfkd_ray.fleet.settings import Settings

if TYPE_CHECKING:
    from dfkd_ray.bundles import Teacher
    from dfkd_ray.fleet.stream import Stream

__all__ = [
    "QUIET",
    "Fleet",
    "Node",
    "Placement",
    "Settings",
    "added_cpus",
    "budget_bytes",
    "connected",
    "first_machines",
    "nodes",
    "plan",
    "requested",
    "started",
]

RESERVE_S = 120.0
START_S = 900.0  # a busy machine takes minutes to import PyTorch
BUDGET_SHARE = 0.3  # of the smallest node's object store, for references to batches


@dataclass
class Fleet:
    """A handle to a running fleet, which trials get by pickling: coordinator, settings, references to teachers."""

    coordinator: Any
    settings: Settings
    numerics: str
    teachers: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, teacher: "Teacher") -> None:
        """Put a teacher into the object store, once for all trials and synthesizers."""
        from dfkd_ray import bundles

        if teacher.hash not in self.teachers:
            self.teachers[teacher.hash] = [ray.put(bundles.to_arrays(teacher))]

    def stream(self, **options: Any) -> "Stream":
        """A stream of batches for one trial."""
        from dfkd_ray.fleet.stream import Stream

        options.setdefault("timeout_s", (MAX_TIMEOUTS + 1) * self.settings.batch_timeout_s)
        return Stream(self.coordinator, self.teachers, self.settings.cache_root, self.numerics, **options)

    def status(self, timeout_s: float = 10.0) -> dict[str, Any] | None:
        """Counts, queue depth and idle shares; None while the coordinator does not answer."""
        try:
            return ray.get(self.coordinator.status.remote(), timeout=timeout_s)
        except (RayError, GetTimeoutError):
            return None


@contextmanager
def requested(bundles: list[dict[str, float]]) -> Iterator[None]:
    """While open, the autoscaler is asked for machines on which all `bundles` fit at the same time.

    A cluster keeps only one such request: this one replaces any other.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
    try:
        yield
    finally:
        request_resources(bundles=[])


@contextmanager
def started(settings: Settings, teachers: "Sequence[Teacher]" = (), start_s: float = START_S) -> Iterator[Fleet]:
    """Start a fleet; the body runs when at least one synthesizer answers.

    `OSError`, with the reason, if they cannot be reserved, if none can start, or after `start_s`.

    The synthesizers' placement group is created here and lives as long as the sweep. A synthesizer that dies restarts
    in its bundle, even if trials hold all other resources.
    """
    need = {name: share for name, share in (("CPU", settings.cpus), ("GPU", settings.gpus)) if share}
    group = placement_group([dict(need) for _ in range(settings.num_synthesizers)], strategy="SPREAD")
    coordinator: Any = None
    try:
        if not group.wait(reserve_s := min(RESERVE_S, start_s)):
            raise OSError(
                f"{settings.num_synthesizers} synthesizers of {settings.cpus:g} CPUs and {settings.gpus:g} GPUs could "
                f"not be reserved within {reserve_s:.0f} s; free now: {ray.available_resources()}"
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(Coordinator)
        coordinator = actor.options(
            num_cpus=0, max_restarts=-1, max_concurrency=10_000, scheduling_strategy=here
        ).remote(replace(settings, placement_group=group))
        try:
            status: Any = ray.get(coordinator.ready.remote(), timeout=start_s)
        except GetTimeoutError:
            status = ray.get(coordinator.status.remote(), timeout=start_s)
            raise OSError(f"no synthesizer came up within {start_s:.0f} s: {status['trouble']}") from None
        if status["numerics"] is None:
            raise OSError(f"no synthesizer could start: {status['trouble']}")
        fleet = Fleet(coordinator, settings, status["numerics"])
        for teacher in teachers:
            fleet.add(teacher)
        yield fleet
    finally:
        if coordinator is not None:
            ray.kill(coordinator)  # the synthesizers, which it owns, die with it
        remove_placement_group(group)


def budget_bytes(share: float = BUDGET_SHARE) -> int:
    """The bytes of batches that may be kept in memory: a share of the smallest node's object store."""
    stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return int(share * min(stores))
