"""`dfkd-ray schema`, and the output of `dfkd-ray sweep --dry-run`."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_ray.cli.live import duration
from dfkd_ray.cli.streams import say
from dfkd_ray.config import follows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfkd_ray.sweep import Plan
    from dfkd_ray.sweep.estimate import Estimate, Machine, Synthesis
    from dfkd_ray.sweep.timings import Timings


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
    path: Path | None = None,
    stored: "Timings | None" = None,
) -> None:
    """Print the number of trials and syntheses of a sweep, and their estimated cost. Nothing is started.

    `stored` holds the measured costs in the file at `path`. Missing ones are measured, if this machine is of the same
    kind, and added to the file.
    """
    import torch

    from dfkd_ray import __version__, cache, devices
    from dfkd_ray.sweep import estimate as estimates
    from dfkd_ray.sweep import timings

    jobs = [job for job in plan.likely_jobs(len(done)) if job.id not in done]
    machine = machine_of(gpus, not jobs or any(job.config.device != "cpu" for job in jobs), stored)
    device = torch.device("cuda" if machine.kind == "GPU" and torch.cuda.is_available() else "cpu")
    here = devices.numerics_class(device)
    numerics = stored.numerics if stored else here

    def num_cached(key: str) -> int:
        return len(cache.indices(cache.folder_of(cache_root, key, numerics)))

    made = estimates.syntheses(jobs, num_cached)
    say(f"{file}: {plan.num_trials} trials, {len(done)} already finished, {len(jobs)} to run")
    print_syntheses(made)
    if not jobs:
        return
    units = {estimates.unit_of(one): one for one in (*made, *jobs)}
    costs = dict(stored.costs) if stored else {}
    missing = {unit: one for unit, one in units.items() if unit not in costs}
    how = []
    if stored and len(missing) < len(units):
        version = "" if stored.package_version == __version__ else f" (this is {__version__})"
        by = f"by dfkd_ray {stored.package_version}{version}"
        how.append(f"{len(units) - len(missing)} timings of {path}, timed on {numerics} {by}")
    if missing:
        if path and stored and here != numerics:
            raise timings.lack(path, stored, missing, len(units), here)
        say(f"timing a few steps of each kind on this machine, about {estimates.CAP_S:.0f} s …")
        start = time.perf_counter()
        costs |= estimates.calibrate(missing, device, estimates.CAP_S, trust_code)
        wall_s = time.perf_counter() - start
        how.append(f"{len(missing)} timings in {wall_s:.0f} s on {here}, on a machine as busy as it is now")
        if path:
            model = here.rpartition(", torch ")[0]
            own = timings.Timings(
                package_version=__version__, kind=machine.kind, device=model, numerics=here, costs=costs
            )
            timings.write(path, own)
            say(f"timings written to {path}")
    if num_scaled := sum(costs[unit].scaled for unit in units):
        how.append(f"{num_scaled} of them on fewer images, and scaled")
    print_estimate(estimates.estimate(jobs, made, costs, machine, num_test_images), how, machine)
    if plan.search:
        say("Optuna chooses its points as it goes: random points of the same space stand for them here")
    if plan.stop:
        say("early stopping is not counted: what it saves is not known beforehand")
    if any(job.config.enough_kl for job in jobs):
        say("enough_kl is not counted: a repair that it ends takes less, another one may fit its layers twice")


def machine_of(gpus: int | None, may_use_gpu: bool, stored: "Timings | None" = None) -> "Machine":
    """The machine to estimate for: `gpus` GPUs, or this machine's GPUs or cores; of the kind of `stored`."""
    import os

    import torch

    from dfkd_ray.sweep.estimate import Machine

    here = torch.cuda.device_count() if may_use_gpu else 0
    if stored and stored.kind == "GPU":
        if not may_use_gpu:
            raise ValueError(f"--timings are of a GPU ({stored.device}), and all trials have device=cpu")
        if gpus == 0 or not (gpus or here):
            raise ValueError(f"--timings are of a GPU ({stored.device}): say how many to plan for, as in --gpus 8")
        return Machine(gpus or here, "GPU")
    if stored and gpus:
        raise ValueError(
            f"--gpus {gpus}: these --timings are of CPU cores ({stored.device}), which say nothing about a GPU; "
            "name another file, or leave --gpus out"
        )
    if gpus and not here:
        raise ValueError(
            f"--gpus {gpus}: this machine has no GPU that the sweep would use, and a CPU's seconds say nothing about "
            "one; give --timings FILE.json that the same dry run has written on a machine with such a GPU, or leave "
            "--gpus out"
        )
    if here and gpus != 0 and not stored:
        return Machine(gpus or here, "GPU")
    return Machine(len(os.sched_getaffinity(0)), "CPU core")


def print_syntheses(made: "Sequence[Synthesis]") -> None:
    """Print the distinct syntheses, one per line."""
    total, cached = sum(one.num_batches for one in made), sum(one.num_cached for one in made)
    say(f"{len(made)} distinct syntheses, {total} batches ({cached} of them in the cache):")
    for one in made:
        kind = (one.domain, one.config.method)
        like = [other.config for other in made if (other.domain, other.config.method) == kind]
        config = one.config.model_dump(mode="json")
        differing = [name for name in config if len({str(getattr(other, name)) for other in like}) > 1]
        what = "reference set" if one.domain == "reference" else one.config.method
        fields = "".join(f", {name} {config[name]}" for name in differing if not follows(name))
        say(
            f"  {one.key[:12]}  {Path(one.teacher.name).name}, {what}{fields}: "
            f"{one.num_batches} x {one.config.batch_size} images for {one.num_users} trials"
        )


def print_estimate(estimate: "Estimate", how: "Sequence[str]", machine: "Machine") -> None:
    """Print wall time, machine-hours, the bound of the wall time, and the basis of the estimate."""
    from dfkd_ray.sweep.estimate import START_S

    spread = f"{machine.num} {machine.kind}{'s' if machine.num != 1 else ''}"
    hours, alone = (made_h + estimate.trials_h for made_h in (estimate.synthesis_h, estimate.unshared_h))
    share = 100 * estimate.synthesis_h / max(hours, 1e-9)
    say(
        f"estimated: {duration(estimate.wall_s)} on {spread}, {hours:.3g} {machine.kind}-hours "
        f"({share:.0f} % synthesis, {100 - share:.0f} % trials); {alone:.3g} if every trial made its own images"
    )
    waits, longest = duration(estimate.waits_s), duration(estimate.longest_s)
    bounds = {
        "work": f"all the work, spread over {spread}",
        "images": f"one trial's wait of {waits} for the last batch that it needs, and then its own {longest}",
        "trial": f"the longest trial: {longest}, after {waits} until the last batch that it needs",
    }
    say(f"bound by: {bounds[estimate.bound]} (and {START_S:.0f} s to start)")
    say(
        f"how: {'; '.join(how)}; one worker at a time: workers that slow each other down, and torch.compile, are not "
        "in it"
    )
