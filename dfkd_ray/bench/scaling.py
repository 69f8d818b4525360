"""Benchmark: the largest fleet for one coordinator, measured with simulated synthesizers and extrapolated by a model.

Coordinator, streams and object store are real. A simulated synthesizer sleeps for a fraction of a batch's real time, so
the rates are those of a fleet that is larger by the same factor. Measured is the coordinator's CPU time per batch. The
model tells which of three parts reaches its limit first:

coordinator   one process, one event loop: CPU seconds per batch made, and per batch given to a trial
network       of a node whose trials read every batch: each batch is transferred once per node
object store  up to two batches per slot are made ahead of their readers; beyond the budget of references (`fleet.
              budget_bytes`) they are dropped, and read again from the cache
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from dfkd_ray import fleet
from dfkd_ray.fleet.simulated import Simulated, simulated_spec
from dfkd_ray.fleet.synthesizer import Spec

MB = 1e6
NUM_ACTORS = 4  # processes that simulate all synthesizers
NUM_READERS = 3  # first all of them, then only one: two loads, to separate the costs of making and of handing out
PROBE_S = 0.02
MIN_MADE = 10  # batches that a valid measurement needs
PATIENCE_S = 120.0
SHAPE = (256, 1, 32, 32)
MODELLED = {"256x1x32x32": 256 * 1 * 32 * 32, "256x3x32x32": 256 * 3 * 32 * 32, "256x3x224x224": 256 * 3 * 224 * 224}


@dataclass(frozen=True)
class Assumed:
    """The assumptions of the model."""

    batch_s: float  # of one synthesizer
    num_readers: int  # trials that read each batch
    network_bytes_per_s: float  # of a node, each way
    store_bytes: float  # the smallest node's object store


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the coordinator's process, all its threads."""

    make_s: float  # per batch made
    hand_s: float  # per batch handed to one trial

    def of(self, num_readers: int | float) -> float:
        """CPU seconds per batch that is read by `num_readers` trials."""
        return self.make_s + num_readers * self.hand_s


@dataclass(frozen=True)
class Load:
    """The measurements of one fleet under one load."""

    begin: float
    end: float
    made: int
    handed: int  # to all readers together, and to the probe
    cpu_s: float
    memory_bytes: int
    takes_s: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """The duration of the measurement."""
        return self.end - self.begin

    @property
    def rate(self) -> float:
        """Batches made per second."""
        return self.made / self.seconds

    def with_readers(self, came: Sequence[Sequence[float]]) -> "Load":
        """A copy with the number of batches that readers received meanwhile, from the arrival times of each reader."""
        return replace(self, handed=self.handed + sum(self.begin < at <= self.end for own in came for at in own))


def cost_of(light: Load, heavy: Load) -> Cost:
    """Solve CPU seconds = made x make_s + handed x hand_s for the two loads; negative results become zero."""
    determinant = light.made * heavy.handed - heavy.made * light.handed
    if determinant <= 0:
        raise ValueError(
            f"{heavy.handed} batches handed out of {heavy.made} made is no more than {light.handed} of {light.made}: "
            "too few to tell what either costs; measure longer with `seconds`, or fewer at a time with `simulated_s`"
        )
    hand_s = max(0.0, (light.made * heavy.cpu_s - heavy.made * light.cpu_s) / determinant)
    return Cost(max(0.0, (light.cpu_s - light.handed * hand_s) / light.made), hand_s)


def carried(assumed: Assumed, cost: Cost, batch_bytes: int | float) -> dict[str, float]:
    """Part → number of synthesizers at its limit."""
    return {
        "coordinator": assumed.batch_s / cost.of(assumed.num_readers),
        "network": assumed.batch_s * assumed.network_bytes_per_s / batch_bytes,
        "object store": fleet.BUDGET_SHARE * assumed.store_bytes / (2 * batch_bytes),
    }


def first_limit(limits: Mapping[str, float]) -> str:
    """The part that reaches its limit first."""
    return min(limits, key=lambda part: limits[part])


def quantile(values: Sequence[int | float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    return float(sorted(values)[min(len(values) - 1, int(share * len(values)))])


class Reader:
    """A simulated trial that only reads batches, in its own process."""

    def __init__(self) -> None:
        self.ended: set[str] = set()

    def ready(self) -> None:
        """Return when the process is ready."""
        import dfkd_ray.fleet.stream  # noqa: F401  # takes seconds, which the first load would measure

    def read(self, running: fleet.Fleet, spec: Spec) -> list[float]:
        """Read in order until stopped; returns arrival times (`time.monotonic`, one clock for all processes)."""
        came = []
        for _ in running.stream().batches(spec, range(10**6)):
            came.append(time.monotonic())
            if spec.key in self.ended:
                break
        return came

    def stop(self, key: str) -> None:
        """Stop reading this key after the next batch."""
        self.ended.add(key)


def status(running: fleet.Fleet) -> dict[str, Any]:
    """The coordinator's status, with a long timeout."""
    status = running.status(timeout_s=60.0)
    assert status is not None, "the coordinator does not answer"
    return status | {"now": time.monotonic()}


def wait_until(running: fleet.Fleet, count: str, number: int) -> None:
    """Wait until a count in the coordinator's status reaches `number`; `OSError` if it does not."""
    end = time.monotonic() + PATIENCE_S
    while (have := status(running)[count]) < number:
        if time.monotonic() > end:
            raise OSError(f"{count}: {have} of {number} within {PATIENCE_S:.0f} s: this machine is too busy for this")
        time.sleep(PROBE_S)


def watch(running: fleet.Fleet, spec: Spec, seconds: float, *, probe: bool) -> Load:
    """Measure the coordinator for `seconds`, or longer if too few batches are made in that time.

    With `probe`, a batch that is in memory is requested repeatedly, and the responses are timed. `OSError` if the
    machine is too busy.
    """
    after = before = status(running)
    begin, takes = time.monotonic(), []
    node = ray.get_runtime_context().get_node_id()
    while (now := time.monotonic()) < begin + seconds or (
        after["made"] - before["made"] < MIN_MADE and now < begin + seconds + PATIENCE_S
    ):
        if probe:
            ray.get(running.coordinator.take.remote(spec.key, [0], 0, node, 0.0))
            takes.append(time.monotonic() - now)
        time.sleep(PROBE_S if probe else max(PROBE_S, begin + seconds - now))
        if time.monotonic() > begin + seconds:
            after = status(running)
    if after["made"] - before["made"] < MIN_MADE:
        raise OSError(
            f"{after['made'] - before['made']} simulated batches in {after['now'] - begin:.0f} s: this machine is too "
            "busy, or `simulated_s` too long"
        )
    made, cpu_s = after["made"] - before["made"], after["cpu_s"] - before["cpu_s"]
    return Load(before["now"], after["now"], made, len(takes), cpu_s, after["memory_bytes"], tuple(takes))


def simulate(readers: Sequence[Any], size: int, simulated_s: float, seconds: float) -> tuple[Load, Load]:
    """Measure a fleet of `size` slots: with all readers, then with only one; returns (light load, heavy load)."""
    actors = next(number for number in range(NUM_ACTORS, 0, -1) if size % number == 0)
    settings = fleet.Settings(
        num_synthesizers=actors,
        cpus=0.1,
        slots=size // actors,
        make=Simulated,
        device="cpu",
        budget_bytes=fleet.budget_bytes(),
    )
    spec = simulated_spec(f"{size} synthesizers", SHAPE, (0.5 * simulated_s, 1.5 * simulated_s))
    with fleet.started(settings) as running:
        wait_until(running, "synthesizers_up", actors)  # a fleet counts as up with its first synthesizer
        reading = [reader.read.remote(running, spec) for reader in readers]
        wait_until(running, "made", 2 * size)  # until then the slots finish their batches at the same time
        heavy = watch(running, spec, seconds, probe=True)
        ray.get([reader.stop.remote(spec.key) for reader in readers[1:]])
        came: list[list[float]] = ray.get(reading[1:])
        light = watch(running, spec, seconds, probe=False)
        ray.get(readers[0].stop.remote(spec.key))
        came.append(ray.get(reading[0]))
    return light.with_readers(came), heavy.with_readers(came)


def run(sizes: Sequence[int], assumed: Assumed, simulated_s: float, seconds: float) -> list[tuple[Load, Load]]:
    """Measure fleets of these sizes, and print their limits."""
    print(
        f"bench scaling: a batch in {simulated_s:g} s instead of {assumed.batch_s:g} s: the rates are those of "
        f"{assumed.batch_s / simulated_s:g} times as many synthesizers; {seconds:g} s per load\n"
    )
    print(
        "| synthesizers | batches/s wanted | made | coordinator, % of a core | CPU ms per batch, 1 reader | 3 readers "
        "| `take`, mean ms | 99 % ms | coordinator MB | MB/s to a node |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    loads = []
    actor: Any = ray.remote(Reader)
    with fleet.connected(num_cpus=8):
        readers = [actor.options(num_cpus=0.1, max_concurrency=2).remote() for _ in range(NUM_READERS)]
        ray.get([reader.ready.remote() for reader in readers])
        for size in sizes:
            light, heavy = simulate(readers, size, simulated_s, seconds)
            loads.append((light, heavy))
            print(row_of(size, simulated_s, light, heavy), flush=True)
    cost = cost_of(*loads[-1])
    print(
        f"\nof the coordinator's CPU, from the fleet of {sizes[-1]}: {1e3 * cost.make_s:.2f} ms per batch made, "
        f"{1e3 * cost.hand_s:.2f} ms per trial that it is handed to\n\n"
        f"model: {assumed.batch_s:g} s a batch, {assumed.num_readers} trials read each, "
        f"{assumed.network_bytes_per_s * 8e-9:g} Gbit/s a node, stores of {assumed.store_bytes / 1e9:g} GB\n\n"
        "| a batch | MB | " + " | ".join(f"{size} synthesizers, MB/s to a node" for size in sizes) + " "
        "| synthesizers that the coordinator carries | network | object store |\n"
        + "|---" * (5 + len(sizes)) + "|"
    )  # fmt: skip
    for name, size_bytes in MODELLED.items():
        limits = carried(assumed, cost, size_bytes)
        first = first_limit(limits)
        traffic = [f"{size / assumed.batch_s * size_bytes / MB:.1f}" for size in sizes]
        cells = [f"**{limit:,.0f}**" if part == first else f"{limit:,.0f}" for part, limit in limits.items()]
        print("| " + " | ".join([name, f"{size_bytes / MB:.2f}", *traffic, *cells]) + " |")
    return loads


def row_of(size: int, simulated_s: float, light: Load, heavy: Load) -> str:
    """The table row of one size, in Markdown."""
    image_bytes = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
    cells = [
        f"{size}",
        f"{size / simulated_s:.1f}",
        f"{light.rate:.1f} / {heavy.rate:.1f}",
        f"{100 * light.cpu_s / light.seconds:.0f} / {100 * heavy.cpu_s / heavy.seconds:.0f}",
        f"{1e3 * light.cpu_s / light.made:.2f}",
        f"{1e3 * heavy.cpu_s / heavy.made:.2f}",
        f"{1e3 * sum(heavy.takes_s) / len(heavy.takes_s):.1f}",
        f"{1e3 * quantile(heavy.takes_s, 0.99):.1f}",
        f"{max(light.memory_bytes, heavy.memory_bytes) / MB:.0f}",
        f"{light.handed * image_bytes / light.seconds / MB:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"
