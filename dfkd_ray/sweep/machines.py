"""From jobs and options to fleet settings and reservations (fleet.placement); waits for a cluster's first machine.

A cluster whose head offers no CPUs and that launches machines on demand (`min_workers: 0`) has no machine to plan for
at first. If `synthesizers` is a range, one machine is requested from the autoscaler and waited for, and the plan is
made for it. The autoscaler launches further machines for pending trials and for synthesizers that the fleet adds.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dfkd_ray.sweep.jobs import Job

log = logging.getLogger(__name__)
Asked = int | tuple[int, int] | None  # synthesizers: a number, (fewest, most), or None: as many as fit
FIRST_MACHINE_S = 900.0
LOOK_S = 1.0


def preflight(
    todo: Sequence[Job],
    cache_root: str | None,
    synthesizers: Asked,
    gpus_per_synthesizer: float | None,
    gpus_per_trial: float | None,
) -> tuple[Any, Any]:
    """The fleet's settings, and the placement of fleet and trials; `ValueError` if they do not fit."""
    from dfkd_ray import fleet

    fewest, most = fewest_and_most(synthesizers)
    threads, trial_threads = threads_of(todo)
    machines = fleet.nodes()
    use_gpu = any(node.gpus for node in machines) and any(job.config.device != "cpu" for job in todo)
    placement = fleet.plan(
        machines,
        synthesizers=fewest or None,
        synthesizer_threads=threads,
        trial_threads=trial_threads,
        use_gpu=use_gpu,
        gpus_per_synthesizer=gpus_per_synthesizer,
        gpus_per_trial=gpus_per_trial,
    )
    if use_gpu and not placement.trial_gpus and any(job.config.device == "cuda" for job in todo):
        raise ValueError(
            "`gpus_per_trial=0`: trials with device=cuda need a share of a GPU; device=auto takes the CPU without one"
        )
    settings = fleet.Settings(
        num_synthesizers=placement.num_synthesizers,
        cpus=placement.synthesizer_cpus,
        gpus=placement.synthesizer_gpus,
        cache_root=cache_root,
        device="auto" if placement.synthesizer_gpus else "cpu",  # without a share, it must not use the trials' GPUs
        threads=threads,
        trial_gpus=placement.trial_gpus,
        most="auto" if synthesizers is None else most,
        added_cpus=0.0 if most is None else fleet.added_cpus(machines, threads, placement.synthesizer_gpus),
        budget_bytes=fleet.budget_bytes(),
    )
    return settings, placement


def fewest_and_most(synthesizers: Asked) -> tuple[int | None, int | None]:
    """(fewest, most) synthesizers; most is None unless a range is given. `ValueError` for an invalid range."""
    fewest, most = synthesizers if isinstance(synthesizers, tuple) else (synthesizers, None)
    if most is not None and not 1 <= (fewest or 0) <= most:
        raise ValueError(f"synthesizers {fewest} to {most}: expected at least 1, and the fewest not above the most")
    return fewest, most


def threads_of(todo: Sequence[Job]) -> tuple[int, int]:
    """The largest number of threads of any synthesis, and of any distillation."""
    return (
        max(getattr(job.config.synthesis, "num_threads", 1) for job in todo),
        max(job.config.distillation.num_threads for job in todo),
    )


@contextmanager
def first_machine(
    todo: Sequence[Job],
    synthesizers: Asked,
    gpus_per_synthesizer: float | None,
    gpus_per_trial: float | None,
    limit_s: float = FIRST_MACHINE_S,
) -> Iterator[None]:
    """With a range of synthesizers and no machine with CPUs: wait for a machine before the body runs.

    The request to the autoscaler stays until the body ends, so that the machine is not removed before the fleet has
    made its reservation. `OSError` if no machine comes within `limit_s`. In all other cases this does nothing.
    """
    from dfkd_ray import fleet

    fewest, most = fewest_and_most(synthesizers)  # check the range before waiting for a machine
    if most is None or any(node.cpus for node in fleet.nodes()):
        yield
        return
    asked = fleet.first_machines(fewest or 1, max(threads_of(todo)), gpus_per_synthesizer, gpus_per_trial)
    with fleet.requested(asked):
        wait_for_machines(asked, limit_s)
        yield


def wait_for_machines(asked: list[dict[str, float]], limit_s: float) -> None:
    """Wait until a machine has CPUs and the machines with CPUs have the GPUs that were requested."""
    from dfkd_ray import fleet

    needs = {name: sum(bundle.get(name, 0.0) for bundle in asked) for name in ("CPU", "GPU")}
    words = " and ".join(f"{need:g} {name}s" for name, need in needs.items() if need)
    log.warning("no machine has CPUs yet: waiting up to %.0f s for one (%s) from the autoscaler", limit_s, words)
    end = time.monotonic() + limit_s
    while True:
        machines = [node for node in fleet.nodes() if node.cpus]
        # One CPU is enough: a trial with more threads than the machine has cores still runs on it.
        if machines and sum(node.gpus for node in machines) >= needs["GPU"]:
            return
        if time.monotonic() > end:
            have = f"{len(machines)} with CPUs and {sum(node.gpus for node in machines):g} GPUs came"
            raise OSError(
                f"no machine for this sweep came within {limit_s:.0f} s: {words} were asked for, {have}; "
                "`ray status` on the cluster's head says what it launches and why not"
            )
        time.sleep(LOOK_S)
