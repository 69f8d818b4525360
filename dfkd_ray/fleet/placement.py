"""Plans the number of synthesizers, and the CPUs and GPUs that each one and each trial reserves. Pure: no Ray calls.

CPUs. Ray's reservations are logical: they limit what may start, not which cores a process uses. All synthesizers
together reserve 5 % of the CPUs of the smallest machine; trials reserve the rest. Both fit wherever Ray places them, so
neither side can take what the other needs to start: there is no deadlock, on one core or on thousands. A trial that
waits for images leaves its cores to the synthesizers, and an idle synthesizer uses none.

GPUs. A synthesizer and a trial reserve half a GPU each by default, for the same reason.

Range MIN-MAX of synthesizers. The first MIN are planned as above. Those added later must be visible to an autoscaler,
so they reserve more: their share of a GPU or, without GPUs, one CPU per thread. On machines full of trials they stay
pending, and the autoscaler launches a machine, which pending trials may use too. This cannot deadlock: the MIN and the
running trials keep their reservations, and added synthesizers are removed when they are idle.

With "auto", synthesizers are added for machines that join later. They must not take what a trial needs to start: they
reserve no CPUs, and of the GPUs only what `automatic` leaves them. They are spread over the machines.

Placement. Only machines with GPUs have room for a share of one. The fleet's placement group has the strategy SPREAD:
one synthesizer per machine as far as they go, then each where most is free, so machines with free GPUs come first.
Added synthesizers with a GPU are spread over the machines with room. Added ones of a range without a GPU follow Ray's
default: they prefer machines without GPUs and fill one after the other to one half, so the other machines stay idle and
can be removed. A sweep without GPUs uses the cores of all machines, including those with GPUs, and reserves no GPU. The
coordinator and the progress board reserve nothing and run on the driver's machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SYNTHESIZERS_SHARE = 0.05  # of the smallest machine's CPUs
RESOLUTION = 0.0001  # of Ray's resources


@dataclass(frozen=True)
class Node:
    """The logical CPUs and GPUs of one machine."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Placement:
    """The number of synthesizers, the least number of trials that run beside them, and what each one reserves."""

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
    """The reservations for this number of `synthesizers` (None: as many as the GPUs or cores allow, see `automatic`).

    `ValueError`, with the numbers, if not even one trial fits beside them.
    """
    nodes = [node for node in nodes if node.cpus > 0]
    total_cpus, total_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes) if use_gpu else 0.0
    have = f"{len(nodes)} node(s) with {total_cpus:g} CPUs and {total_gpus:g} GPUs"
    if not nodes:
        raise ValueError(
            f"placement: no CPU is free; there are {have}; where machines are launched on demand, give a range of "
            "synthesizers, as in `synthesizers=1-8`"
        )
    gpu_s = gpu_share("gpus_per_synthesizer", gpus_per_synthesizer) if use_gpu else 0.0
    gpu_t = gpu_share("gpus_per_trial", gpus_per_trial) if use_gpu else 0.0
    if synthesizers is not None and synthesizers < 1:
        raise ValueError(f"`synthesizers={synthesizers}`: expected at least 1; there are {have}")
    count = synthesizers or automatic(nodes, synthesizer_threads, gpu_s, gpu_t, trial_threads)
    num_trials = trials_beside(nodes, count, trial_threads, gpu_s, gpu_t)
    if not num_trials:
        asked = f"{count} synthesizer(s) of {gpu_s:g} GPU" if synthesizers else f"a synthesizer of {gpu_s:g} GPU"
        fewer = "fewer `synthesizers`, or " if synthesizers else ""
        raise ValueError(
            f"placement: {asked} leave no room for one trial of {gpu_t:g} GPU; there are {have}; "
            f"ask for {fewer}smaller shares with `gpus_per_synthesizer` and `gpus_per_trial`"
        )
    kept = [SYNTHESIZERS_SHARE * node.cpus for node in homes(nodes, gpu_s)]
    synthesizer_cpus = max(rounded(min(kept) / count), RESOLUTION)
    if count * synthesizer_cpus > sum(kept):
        raise ValueError(f"`synthesizers={count}`: that many do not fit; there are {have}")
    machines = homes(nodes, gpu_t)
    by_cores = zip(machines, trials_by_cores(machines, trial_threads), strict=True)
    trial_cpus = min((1 - SYNTHESIZERS_SHARE) * node.cpus / num for node, num in by_cores if num)
    return Placement(count, synthesizer_cpus, gpu_s, num_trials, rounded(trial_cpus), gpu_t)


def added_cpus(nodes: Sequence[Node], threads: int, gpu_s: float) -> float:
    """The CPUs that an added synthesizer of a range reserves: one per thread or, with a GPU, a small fraction.

    With a GPU, so few that even a machine full of trials has CPUs for as many as its GPUs have shares for. Without, at
    most the trials' part of the largest machine.
    """
    if not gpu_s:
        return rounded(min(float(threads), (1 - SYNTHESIZERS_SHARE) * max(node.cpus for node in nodes)))
    kept = [
        SYNTHESIZERS_SHARE * node.cpus / max(1, slots([1.0] * int(node.gpus), gpu_s))
        for node in homes(nodes, gpu_s)
        if node.cpus
    ]
    return max(rounded(min(kept)), RESOLUTION)


def first_machines(
    fewest: int, threads: int, gpus_per_synthesizer: float | None, gpus_per_trial: float | None
) -> list[dict[str, float]]:
    """The request to an autoscaler when there is no machine yet: enough for the fleet and one trial.

    Bundles of whole GPUs if GPU shares were given, else one bundle with a CPU per thread.
    """
    if not (gpus_per_synthesizer or gpus_per_trial):
        return [{"CPU": float(threads)}]
    gpu_s = gpu_share("gpus_per_synthesizer", gpus_per_synthesizer)
    gpu_t = gpu_share("gpus_per_trial", gpus_per_trial)
    each = max(1.0, gpu_s, gpu_t)
    num = 1
    while not trials_beside([Node(float(threads), each)] * num, fewest, threads, gpu_s, gpu_t):
        num += 1  # at most one per synthesizer, and one for the trial
    return [{"GPU": each}] * num


def gpu_share(name: str, given: float | None) -> float:
    """The share of a GPU to reserve: half by default. `ValueError`, with the option's `name`, for an invalid share."""
    if given is None:
        return 0.5
    if not 0 <= given < math.inf or (given > 1 and given != int(given)):
        raise ValueError(f"`{name}={given:g}`: expected a fraction up to 1, or a whole number of GPUs")
    return rounded(given)


def homes(nodes: Sequence[Node], share: float) -> list[Node]:
    """The machines that can run an actor with this share of a GPU: all for share 0, else those with GPUs."""
    return [node for node in nodes if not share or node.gpus]


def trials_by_cores(nodes: Sequence[Node], threads: int) -> list[int]:
    """The number of trials that each machine has cores for; if none has enough, each largest machine gets one."""
    counts = [math.floor(node.cpus / threads) for node in nodes]
    if any(counts):
        return counts
    largest = max((node.cpus for node in nodes), default=0.0)
    return [int(node.cpus == largest) for node in nodes]


def trials_beside(nodes: Sequence[Node], count: int, threads: int, gpu_s: float, gpu_t: float) -> int:
    """Trials that fit beside `count` synthesizers in the worst case: spread or packed, in either order."""
    orders = (list(nodes), list(nodes)[::-1]) if gpu_s else (list(nodes),)
    return min(
        sum(trials_left(order, count, threads, gpu_s, gpu_t, packed=packed))
        for order in orders
        for packed in (False, True)
    )


def trials_left(
    nodes: Sequence[Node], count: int, threads: int, gpu_s: float, gpu_t: float, *, packed: bool
) -> list[int]:
    """The number of trials per machine that fit beside `count` synthesizers; all 0 if the synthesizers do not fit."""
    free = [[1.0] * int(node.gpus) for node in nodes]
    taken = [0] * len(nodes)
    for _ in range(count if gpu_s else 0):
        able = [position for position, gpus in enumerate(free) if slots(gpus, gpu_s)]
        if not able:
            return [0] * len(nodes)
        chosen = able[0] if packed else min(able, key=lambda position: (taken[position], -sum(free[position])))
        taken[chosen] += 1
        gpus = free[chosen]
        for _ in range(max(1, int(gpu_s))):
            fitting = [part for part in gpus if part > min(gpu_s, 1.0) - 1e-9]
            gpus[gpus.index(min(fitting) if packed else max(fitting))] -= min(gpu_s, 1.0)
    by_cores = iter(trials_by_cores(homes(nodes, gpu_t), threads))
    counts = []
    for node, gpus in zip(nodes, free, strict=True):
        if gpu_t and not node.gpus:
            counts.append(0)
        elif gpu_t:
            counts.append(min(next(by_cores), slots(gpus, gpu_t)))
        else:
            counts.append(next(by_cores))
    return counts


def automatic(nodes: Sequence[Node], threads: int, gpu_s: float, gpu_t: float, trial_threads: int = 1) -> int:
    """The default number of synthesizers: as many as fit on the GPUs beside trials or, without GPUs, on the cores."""
    if not gpu_s:
        return max(1, sum(math.floor(node.cpus / threads) for node in nodes))
    if gpu_s + gpu_t <= 1:
        most = sum(int(node.gpus) * slots([1 - gpu_t], gpu_s) for node in nodes)
    else:
        most = math.floor(sum(node.gpus for node in nodes) / 2 / gpu_s)
    while most > 1 and not trials_beside(nodes, most, trial_threads, gpu_s, gpu_t):
        most -= 1
    return max(1, most)


def slots(gpus: Sequence[float], share: float) -> int:
    """How many shares fit into the free parts of a machine's GPUs; a share below 1 must fit into one GPU."""
    if share >= 1:
        return math.floor(sum(part > 1 - 1e-9 for part in gpus) / share)
    return sum(math.floor(part / share + 1e-9) for part in gpus)


def rounded(share: float) -> float:
    """The share rounded down to Ray's resource resolution (0.0001)."""
    return math.floor(share / RESOLUTION + 1e-6) / round(1 / RESOLUTION)
