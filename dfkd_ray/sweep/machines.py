"""The machines of a sweep: how fleet and trials share those that there are, and the first of a cluster that has none.

On a cluster whose head computes nothing and whose machines are launched on demand (`min_workers: 0`) there is nothing
to plan by at first. A range of synthesizers says that such machines are wanted: one is asked for, waited for, and the
plan is made by it. All others come of what is pending: trials of Ray Tune, and synthesizers that the fleet adds.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dfkd_ray.sweep.jobs import Job

log = logging.getLogger(__name__)
Asked = int | tuple[int, int] | None  # synthesizers: a number, the fewest and the most, or as many as there is room for
FIRST_MACHINE_S = 900.0
LOOK_S = 1.0


def preflight(
    todo: Sequence[Job],
    cache_root: str | None,
    synthesizers: Asked,
    gpus_per_synthesizer: float | None,
    gpus_per_trial: float | None,
) -> tuple[Any, Any]:
    """Settings of the fleet and the placement of fleet and trials together; `ValueError` where nothing fits."""
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
            "--gpus-per-trial 0: trials with device=cuda need a share of a GPU; device=auto takes the CPU without one"
        )
    settings = fleet.Settings(
        num_synthesizers=placement.num_synthesizers,
        cpus=placement.synthesizer_cpus,
        gpus=placement.synthesizer_gpus,
        cache_root=cache_root,
        device="auto" if placement.synthesizer_gpus else "cpu",  # without a share it takes no trial's GPU
        threads=threads,
        trial_gpus=placement.trial_gpus,
        most="auto" if synthesizers is None else most,
        added_cpus=0.0 if most is None else fleet.added_cpus(machines, threads, placement.synthesizer_gpus),
        budget_bytes=fleet.budget_bytes(),
    )
    return settings, placement


def fewest_and_most(synthesizers: Asked) -> tuple[int | None, int | None]:
    """The most is None where no range is asked for. `ValueError` for a range that is none."""
    fewest, most = synthesizers if isinstance(synthesizers, tuple) else (synthesizers, None)
    if most is not None and not 1 <= (fewest or 0) <= most:
        raise ValueError(f"synthesizers {fewest} to {most}: expected at least 1, and the fewest not above the most")
    return fewest, most


def threads_of(todo: Sequence[Job]) -> tuple[int, int]:
    """The most threads of any synthesis, and of any trial."""
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
    """With a range of synthesizers on a cluster where no machine has CPUs: open once there is one to plan by.

    While open the autoscaler is asked for it, so that it is not taken back before the fleet has its reservation.
    `OSError` where none comes within `limit_s`.
    """
    from dfkd_ray import fleet

    fewest, most = fewest_and_most(synthesizers)  # before anybody waits for a machine
    if most is None or any(node.cpus for node in fleet.nodes()):
        yield
        return
    asked = fleet.first_machines(fewest or 1, max(threads_of(todo)), gpus_per_synthesizer, gpus_per_trial)
    with fleet.requested(asked):
        wait_for_machines(asked, limit_s)
        yield


def wait_for_machines(asked: list[dict[str, float]], limit_s: float) -> None:
    """Wait until the machines that are there hold all that the autoscaler was asked for."""
    from dfkd_ray import fleet

    needs = {name: sum(bundle.get(name, 0.0) for bundle in asked) for name in ("CPU", "GPU")}
    words = " and ".join(f"{need:g} {name}s" for name, need in needs.items() if need)
    log.warning("no machine has CPUs yet: waiting up to %.0f s for one (%s) from the autoscaler", limit_s, words)
    end = time.monotonic() + limit_s
    while True:
        machines = [node for node in fleet.nodes() if node.cpus]
        # Of CPUs one is enough: trials that want more threads than a machine has cores run on it all the same.
        if machines and sum(node.gpus for node in machines) >= needs["GPU"]:
            return
        if time.monotonic() > end:
            have = f"{len(machines)} with CPUs and {sum(node.gpus for node in machines):g} GPUs came"
            raise OSError(
                f"no machine for this sweep came within {limit_s:.0f} s: {words} were asked for, {have}; "
                "`ray status` on the cluster's head says what it launches and why not"
            )
        time.sleep(LOOK_S)
