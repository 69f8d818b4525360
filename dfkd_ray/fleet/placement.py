"""How synthesizers and trials share the devices: numbers that fit together, or a refusal with the numbers.

Half of every node's CPUs is reserved for synthesizers and half for trials. The reservations are Ray's logical ones: the
cores themselves go to whoever has work, so a trial that waits for images leaves its core to their making, and idle
synthesizers cost nothing. Neither side can ever starve the other of its reservation, whatever the grid: there is no
deadlock, on one core as on thousands. GPUs are halved in the same way unless told otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of one machine."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Placement:
    """How many synthesizers and trials run side by side, and what each reserves."""

    num_synthesizers: int
    synthesizer_cpus: float
    synthesizer_gpus: float
    num_trials: int
    trial_cpus: float
    trial_gpus: float


def plan(
    nodes: Sequence[Node],
    *,
    synthesizers: int | None,
    synthesizer_threads: int,
    trial_threads: int,
    use_gpu: bool = False,
    gpus_per_synthesizer: float | None = None,
    gpus_per_trial: float | None = None,
) -> Placement:
    """Reservations for `synthesizers` (None: as many as there are GPUs, or cores for their threads).

    `ValueError` with the numbers where not even one trial fits beside them.
    """
    total_cpus = sum(node.cpus for node in nodes)
    total_gpus = sum(node.gpus for node in nodes) if use_gpu else 0.0
    have = f"{len(nodes)} node(s) with {total_cpus:g} CPUs and {total_gpus:g} GPUs"
    if total_cpus <= 0:
        raise ValueError(f"placement: no CPU is free; there are {have}")
    for name, share in (("--gpus-per-synthesizer", gpus_per_synthesizer), ("--gpus-per-trial", gpus_per_trial)):
        if share is not None and (share < 0 or (share > 1 and share != int(share))):
            raise ValueError(f"{name} {share:g}: expected a fraction up to 1, or a whole number of GPUs")
    if use_gpu:
        gpu_s = 0.5 if gpus_per_synthesizer is None else gpus_per_synthesizer
        gpu_t = 0.5 if gpus_per_trial is None else gpus_per_trial
    else:
        gpu_s = gpu_t = 0.0
    count = synthesizers if synthesizers is not None else automatic(nodes, synthesizer_threads, gpu_s, gpu_t)
    if count < 1:
        raise ValueError(f"--synthesizers {count}: expected at least 1; there are {have}")
    free = [[1.0] * int(node.gpus) for node in nodes]
    fits = not gpu_s or all(take(free, gpu_s) for _ in range(count))
    trials_by_gpu = sum(slots(gpus, gpu_t) for gpus in free) if gpu_t else math.inf
    if not fits:
        trials_by_gpu = 0
    if trials_by_gpu < 1:
        raise ValueError(
            f"placement: {count} synthesizer(s) of {gpu_s:g} GPU leave no room for one trial of {gpu_t:g} GPU; "
            f"there are {have}; ask for fewer with --synthesizers, or smaller shares with --gpus-per-synthesizer "
            "and --gpus-per-trial"
        )
    by_cores = [max(0, math.floor(node.cpus / trial_threads)) for node in nodes]
    if not any(by_cores):
        by_cores = [int(node.cpus > 0) for node in nodes]
    num_trials = int(min(sum(by_cores), trials_by_gpu))
    trial_cpus = min(node.cpus / 2 / num for node, num in zip(nodes, by_cores, strict=True) if num)
    busiest = [(node.cpus, math.ceil(count * node.cpus / total_cpus)) for node in nodes if node.cpus > 0]
    synthesizer_cpus = min(cpus / 2 / num for cpus, num in busiest)
    if synthesizer_cpus < 0.001:
        raise ValueError(f"--synthesizers {count}: that many do not fit; there are {have}")
    return Placement(count, rounded(synthesizer_cpus), gpu_s, num_trials, rounded(trial_cpus), gpu_t)


def automatic(nodes: Sequence[Node], threads: int, gpu_s: float, gpu_t: float) -> int:
    """As many synthesizers as there are free GPUs (their shares beside one trial's), or cores for their threads."""
    if not gpu_s:
        return max(1, sum(math.floor(node.cpus / threads) for node in nodes))
    if gpu_s + gpu_t <= 1:
        return sum(int(node.gpus) * slots([1 - gpu_t], gpu_s) for node in nodes)
    gpus = sum(node.gpus for node in nodes)
    return int(min(gpus / 2, gpus - gpu_t) / gpu_s)


def slots(gpus: Sequence[float], share: float) -> int:
    """How many shares fit into the free parts of a node's GPUs; a share below one never spans two."""
    if share >= 1:
        return math.floor(sum(part > 1 - 1e-9 for part in gpus) / share)
    return sum(math.floor(part / share + 1e-9) for part in gpus)


def take(free: Sequence[list[float]], share: float) -> bool:
    """Take a share where most is free, on the emptiest GPU (as Ray does); False where it fits nowhere."""
    for gpus in sorted(free, key=sum, reverse=True):
        if slots(gpus, share):
            for _ in range(max(1, int(share))):
                gpus[gpus.index(max(gpus))] -= min(share, 1.0)
            return True
    return False


def rounded(share: float) -> float:
    """Down to Ray's resolution of resources."""
    return math.floor(share * 10_000) / 10_000
