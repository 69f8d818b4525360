"""How synthesizers and trials share the devices: numbers that fit together, or a refusal with the numbers.

Reservations are Ray's logical ones. Of CPUs all synthesizers together reserve a twentieth of the smallest machine and
trials the rest, so both fit wherever Ray puts them: neither side can take what the other needs to start, and there is
no deadlock, on one core as on thousands. The cores themselves go to whoever has work: a trial that waits for images
leaves its core to their making, and idle synthesizers cost nothing. Of each GPU a synthesizer and a trial reserve half,
unless told otherwise, for the same reason.

Of a range of synthesizers (MIN-MAX) the first MIN are planned like this. Those added later must be seen by an
autoscaler, so they reserve in earnest: their share of a GPU, or their threads as CPUs where they have none. What is
full of trials has no room for them: then they are pending, which is what makes an autoscaler launch a machine, and
trials that are pending too may have it as well. No deadlock comes of it: the MIN keep their reservation, running trials
theirs, and what is added goes when it is idle.

With `auto` others are added for machines that join later. They are beyond the plan and must not take what a trial needs
to start: they reserve no CPUs, and of the GPUs only what `automatic` leaves them. They are spread.

Where Ray puts them. Only machines with GPUs have room for a share of one. The reservation of the fleet is spread: one
synthesizer on each machine as far as they go, then each where most is free, so machines with free GPUs come first.
Added ones with a GPU are spread over machines with room, in turn. Those of a range without one prefer machines without
GPUs and fill one after the other up to a half, as Ray does by default: so the rest stays idle and can be taken back. A
sweep on CPUs alone uses the cores of all machines, those with GPUs too; it reserves none of their GPUs. The coordinator
and the driver's board reserve nothing, and are on the driver's machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SYNTHESIZERS_SHARE = 0.05  # of the smallest machine's CPUs
RESOLUTION = 0.0001  # of Ray's resources


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of one machine."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Placement:
    """How many synthesizers run, beside at least how many trials, and what each reserves."""

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
    nodes = [node for node in nodes if node.cpus > 0]
    total_cpus, total_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes) if use_gpu else 0.0
    have = f"{len(nodes)} node(s) with {total_cpus:g} CPUs and {total_gpus:g} GPUs"
    if not nodes:
        raise ValueError(
            f"placement: no CPU is free; there are {have}; where machines are launched on demand, give a range of "
            "synthesizers, as in --synthesizers 1-8"
        )
    gpu_s = gpu_share("--gpus-per-synthesizer", gpus_per_synthesizer) if use_gpu else 0.0
    gpu_t = gpu_share("--gpus-per-trial", gpus_per_trial) if use_gpu else 0.0
    if synthesizers is not None and synthesizers < 1:
        raise ValueError(f"--synthesizers {synthesizers}: expected at least 1; there are {have}")
    count = synthesizers or automatic(nodes, synthesizer_threads, gpu_s, gpu_t, trial_threads)
    num_trials = trials_beside(nodes, count, trial_threads, gpu_s, gpu_t)
    if not num_trials:
        asked = f"{count} synthesizer(s) of {gpu_s:g} GPU" if synthesizers else f"a synthesizer of {gpu_s:g} GPU"
        fewer = "fewer with --synthesizers, or " if synthesizers else ""
        raise ValueError(
            f"placement: {asked} leave no room for one trial of {gpu_t:g} GPU; there are {have}; "
            f"ask for {fewer}smaller shares with --gpus-per-synthesizer and --gpus-per-trial"
        )
    kept = [SYNTHESIZERS_SHARE * node.cpus for node in homes(nodes, gpu_s)]
    synthesizer_cpus = max(rounded(min(kept) / count), RESOLUTION)
    if count * synthesizer_cpus > sum(kept):
        raise ValueError(f"--synthesizers {count}: that many do not fit; there are {have}")
    machines = homes(nodes, gpu_t)
    by_cores = zip(machines, trials_by_cores(machines, trial_threads), strict=True)
    trial_cpus = min((1 - SYNTHESIZERS_SHARE) * node.cpus / num for node, num in by_cores if num)
    return Placement(count, synthesizer_cpus, gpu_s, num_trials, rounded(trial_cpus), gpu_t)


def added_cpus(nodes: Sequence[Node], threads: int, gpu_s: float) -> float:
    """CPUs that a synthesizer of a range reserves where it is added to a plan: its threads, or few beside a GPU.

    Beside a GPU: on a machine full of trials there is room for as many as its GPUs have shares for. Without: at most
    what trials may have of the largest machine.
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
    """What to ask an autoscaler for where there is no machine to plan by: what surely takes a fleet and one trial.

    Whole GPUs where shares of them were given, else one machine with the threads as CPUs.
    """
    if not (gpus_per_synthesizer or gpus_per_trial):
        return [{"CPU": float(threads)}]
    gpu_s = gpu_share("--gpus-per-synthesizer", gpus_per_synthesizer)
    gpu_t = gpu_share("--gpus-per-trial", gpus_per_trial)
    each = max(1.0, gpu_s, gpu_t)
    num = 1
    while not trials_beside([Node(float(threads), each)] * num, fewest, threads, gpu_s, gpu_t):
        num += 1  # at most one for each of the fleet, and one for the trial
    return [{"GPU": each}] * num


def gpu_share(name: str, given: float | None) -> float:
    """What is reserved of a GPU: half, or what was asked for."""
    if given is None:
        return 0.5
    if not 0 <= given < math.inf or (given > 1 and given != int(given)):
        raise ValueError(f"{name} {given:g}: expected a fraction up to 1, or a whole number of GPUs")
    return rounded(given)


def homes(nodes: Sequence[Node], share: float) -> list[Node]:
    """The machines where something that needs such a share of a GPU can run."""
    return [node for node in nodes if not share or node.gpus]


def trials_by_cores(nodes: Sequence[Node], threads: int) -> list[int]:
    """Trials that each machine has cores for; where none has enough for one, each of the largest takes one."""
    counts = [math.floor(node.cpus / threads) for node in nodes]
    if any(counts):
        return counts
    largest = max((node.cpus for node in nodes), default=0.0)
    return [int(node.cpus == largest) for node in nodes]


def trials_beside(nodes: Sequence[Node], count: int, threads: int, gpu_s: float, gpu_t: float) -> int:
    """Trials that surely fit beside `count` synthesizers: whether Ray spreads or packs those, wherever it begins."""
    orders = (list(nodes), list(nodes)[::-1]) if gpu_s else (list(nodes),)
    return min(
        sum(trials_left(order, count, threads, gpu_s, gpu_t, packed=packed))
        for order in orders
        for packed in (False, True)
    )


def trials_left(
    nodes: Sequence[Node], count: int, threads: int, gpu_s: float, gpu_t: float, *, packed: bool
) -> list[int]:
    """Trials that fit on each machine beside `count` synthesizers; none at all where those do not fit themselves."""
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
    """As many synthesizers as there are free GPUs (their shares beside a trial's), or cores for their threads."""
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
    """How many shares fit into the free parts of a machine's GPUs; a share below one never spans two."""
    if share >= 1:
        return math.floor(sum(part > 1 - 1e-9 for part in gpus) / share)
    return sum(math.floor(part / share + 1e-9) for part in gpus)


def rounded(share: float) -> float:
    """Down to Ray's resolution of resources."""
    return math.floor(share / RESOLUTION + 1e-6) / round(1 / RESOLUTION)
