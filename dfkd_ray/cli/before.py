"""What `recover` and `sweep` say before they start: the batch sizes of `auto`, memory that may not do, hours."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfkd_ray import config as configs
from dfkd_ray.cli.live import duration
from dfkd_ray.cli.streams import say
from dfkd_ray.config.fields import AUTO

if TYPE_CHECKING:
    from dfkd_ray.bundles import Teacher

LONG_S = 600.0  # a run that seems to take longer is timed before it starts
CAP_S = 20.0  # of that timing
# A smaller run to choose instead. Batch sizes stay: they decide what a step costs.
FEWER = {"distillation.num_images": 256, "bn_num_images": 256, "distillation.num_steps": 75}


def say_batch_sizes(asked: configs.TrialConfig, pinned: configs.TrialConfig) -> None:
    """Print the numbers that `batch_size=auto` stands for in a trial."""
    say_batch_size("synthesis", asked.synthesis, pinned.synthesis)
    say_batch_size("reference.synthesis", asked.reference.synthesis, pinned.reference.synthesis)


def say_batch_size(name: str, asked: Any, pinned: Any) -> None:
    """Print the number that `batch_size=auto` stands for in a synthesis config."""
    if asked.batch_size == AUTO:
        say(f"{name}.batch_size=auto: {pinned.batch_size} images, by this machine's memory")


def say_memory(trials: "Iterable[tuple[configs.TrialConfig, Teacher]]") -> None:
    """Warn of batches of trials that may not fit into this machine's memory, once of each."""
    seen: set[tuple[str, str, int]] = set()
    for config, teacher in trials:
        kd = config.distillation
        batches = (
            ("synthesis", config.synthesis, f"set {AUTO}"),
            ("reference.synthesis", config.reference.synthesis, f"set {AUTO}"),
            ("distillation", kd, "lower it"),
        )
        for name, own, advice in batches:
            if (teacher.hash, name, own.batch_size) not in seen:
                seen.add((teacher.hash, name, own.batch_size))
                say_excess(f"{name}.batch_size", own, teacher, config.device, advice)


def say_excess(name: str, own: Any, teacher: "Teacher", device: str, advice: str = f"set {AUTO}") -> None:
    """Warn of a batch of images that are optimised, or distilled on, if it may not fit into this machine's memory."""
    from dfkd_ray import devices
    from dfkd_ray.synthesis import memory

    threads = getattr(own, "num_threads", None)
    if threads is None:  # nothing is computed
        return
    trained = isinstance(own, configs.DistillationConfig)
    problem = memory.excess(teacher, own.batch_size, devices.resolve(device), threads, trained=trained)
    if problem:
        say(f"warning: {name}={own.batch_size} {problem}: {advice}", error=True)


@dataclass(frozen=True)
class Alone:
    """A trial that runs by itself on this machine, and what its time depends on beside its config."""

    teacher: "Teacher"
    cache_root: str
    num_test_images: int = 0
    trust_code: tuple[str, ...] = ()


def say_hours(config: configs.TrialConfig, alone: Alone) -> None:
    """Print how long a long run will take, and fields with which it takes less. Nothing for a short run."""
    if rough_s(config, alone.teacher) < LONG_S:
        return
    say(f"this may take long; timing a few steps, {CAP_S:.0f} s or more on a busy machine …")
    values = configs.flat(config.model_dump())
    smaller = {name: number for name, number in FEWER.items() if number < values[name]}
    less = configs.validate(configs.TrialConfig, configs.with_overrides(config.model_dump(), smaller))
    whole_s, less_s = estimated_s((config, less), alone)
    say(f"estimated: {duration(whole_s)} from its beginning to its end, on a machine as busy as this one is now")
    if smaller:
        sets = " ".join(f"--set {name}={number}" for name, number in smaller.items())
        say(f"about {duration(less_s)}, for a less accurate student, with {sets}")


def rough_s(config: configs.TrialConfig, teacher: "Teacher") -> float:
    """Seconds of a trial, by one timed pass of the teacher over two images; within a factor of a few."""
    import torch

    from dfkd_ray import devices, trial

    device = devices.resolve(config.device)
    network = trial.on_device(teacher.network, device)
    images = devices.laid_out(torch.zeros(2, *teacher.info.image_shape, device=device), network)
    passes = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            float(network(images).sum())
            passes.append((time.perf_counter() - start) / 2)
    kd, steps = config.distillation, getattr(config.synthesis, "num_steps", 0)
    num_images = trial.batches_wanted(config, True)[1] * config.synthesis.batch_size
    reference = getattr(config.reference.synthesis, "num_steps", 0) * config.reference.num_images
    # Forward and backward are three passes; distillation has the teacher's too.
    return min(passes) * (3 * (num_images * steps + reference) + 4 * kd.num_steps * kd.batch_size)


def estimated_s(trials: Sequence[configs.TrialConfig], alone: Alone) -> list[float]:
    """Seconds of each of these trials, which differ in numbers of images and steps, by timing a few steps."""
    from dfkd_ray import cache, devices
    from dfkd_ray.sweep import estimate
    from dfkd_ray.sweep.jobs import job_of

    device = devices.resolve(trials[0].device)
    numerics = devices.numerics_class(device)
    kind: estimate.Kind = "GPU" if device.type == "cuda" else "CPU core"
    machine = estimate.Machine(1 if kind == "GPU" else getattr(trials[0].synthesis, "num_threads", 1), kind)

    def num_cached(key: str) -> int:
        return len(cache.indices(cache.folder_of(alone.cache_root, key, numerics)))

    jobs = [job_of(config, alone.teacher) for config in trials]
    made = [estimate.syntheses([job], num_cached) for job in jobs]
    work = {estimate.unit_of(one): one for one in (*made[0], jobs[0])}
    costs = estimate.calibrate(work, device, CAP_S, alone.trust_code)
    tests = {alone.teacher.hash: alone.num_test_images}
    return [estimate.estimate([job], own, costs, machine, tests).wall_s for job, own in zip(jobs, made, strict=True)]
