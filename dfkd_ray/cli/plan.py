"""`dfkd-ray schema`, and what `dfkd-ray sweep --dry-run` says."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_ray.cli.live import duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfkd_ray.sweep import Plan
    from dfkd_ray.sweep.estimate import Calibration, Estimate, Machine, Synthesis


def schema() -> None:
    """Print the JSON schema of sweep files, for editors.

    Write it to a file, and name that in a sweep file's first line: # yaml-language-server: $schema=sweep.schema.json
    """
    from dfkd_ray import sweep

    print(json.dumps(sweep.json_schema(), indent=1))


def dry_run(
    file: Path,
    plan: "Plan",
    done: "set[str]",
    cache_root: str,
    num_test_images: "Mapping[str, int]",
    gpus: int | None,
    trust_code: "Sequence[str]",
) -> None:
    """Print how many trials and syntheses a sweep has, and what they will cost. Nothing is started."""
    import torch

    from dfkd_ray import cache, devices
    from dfkd_ray.sweep import estimate as estimates

    jobs = [job for job in plan.likely_jobs(len(done)) if job.id not in done]
    machine = machine_of(gpus, any(job.config.device != "cpu" for job in jobs))
    numerics = devices.numerics_class(torch.device("cuda" if machine.kind == "GPU" else "cpu"))

    def num_cached(key: str) -> int:
        return len(cache.indices(cache.folder_of(cache_root, key, numerics)))

    made = estimates.syntheses(jobs, num_cached)
    print(f"{file}: {plan.num_trials} trials, {len(done)} already finished, {len(jobs)} to run")
    print_syntheses(made)
    if not jobs:
        return
    print(f"timing a few steps of each kind on this machine, about {estimates.CAP_S:.0f} s …", flush=True)
    calibration = estimates.calibrate(jobs, trust_code)
    estimate = estimates.estimate(jobs, calibration.costs, machine, num_test_images, num_cached)
    print_estimate(estimate, calibration, machine, numerics)
    if plan.search:
        print("Optuna chooses its points as it goes: random points of the same space stand for them here")
    if plan.stop:
        print("early stopping is not counted: what it saves is not known beforehand")


def machine_of(gpus: int | None, may_use_gpu: bool) -> "Machine":
    """What the sweep would run on: `gpus` GPUs, those of this machine, or its cores."""
    import os

    import torch

    from dfkd_ray.sweep.estimate import Machine

    here = torch.cuda.device_count() if may_use_gpu else 0
    if gpus and not here:
        raise ValueError(
            f"--gpus {gpus}: this machine has no GPU that the sweep would use, and a CPU's seconds say nothing about "
            "one; run the dry run on a machine with such a GPU, or leave --gpus out"
        )
    if here and gpus != 0:
        return Machine(gpus or here, "GPU")
    return Machine(len(os.sched_getaffinity(0)), "CPU core")


def print_syntheses(made: "Sequence[Synthesis]") -> None:
    """The distinct syntheses, one a line."""
    total, cached = sum(s.num_batches for s in made), sum(s.num_batches - s.num_to_make for s in made)
    print(f"{len(made)} distinct syntheses, {total} batches ({cached} of them in the cache):")
    for synthesis in made:
        like = [other.config for other in made if (other.domain, other.config.method) == kind_of(synthesis)]
        config = synthesis.config.model_dump(mode="json")
        differing = [name for name in config if len({str(getattr(other, name)) for other in like}) > 1]
        what = "reference set" if synthesis.domain == "reference" else synthesis.config.method
        told = "".join(f", {name} {config[name]}" for name in differing if name != "record_sha256")
        print(
            f"  {synthesis.key[:12]}  {Path(synthesis.teacher.name).name}, {what}{told}: "
            f"{synthesis.num_batches} x {synthesis.config.batch_size} images for {synthesis.num_users} trials"
        )


def kind_of(synthesis: "Synthesis") -> tuple[str, str]:
    """What syntheses are compared within."""
    return synthesis.domain, synthesis.config.method


def print_estimate(estimate: "Estimate", calibration: "Calibration", machine: "Machine", numerics: str) -> None:
    """Time, hours, and how they were got."""
    spread = f"{machine.num} {machine.kind}{'s' if machine.num != 1 else ''}"
    share = 100 * estimate.synthesis_s / max(estimate.synthesis_s + estimate.trials_s, 1e-9)
    print(
        f"estimated: {duration(estimate.wall_s)} on {spread}, {estimate.units_h:.3g} {machine.kind}-hours "
        f"({share:.0f} % synthesis, {100 - share:.0f} % trials); {estimate.unshared_units_h:.3g} if every trial made "
        "its own images"
    )
    scaled = f"; {calibration.num_scaled} of them on fewer images, and scaled" if calibration.num_scaled else ""
    print(
        f"how: {len(calibration.costs)} timings in {calibration.wall_s:.0f} s on {numerics}{scaled}; one worker at a "
        "time, on a machine as busy as it is now; workers that slow each other down, and torch.compile, are not in it"
    )
