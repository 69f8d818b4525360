"""Estimates a sweep's cost before it starts: the number of units of work times the seconds per unit on this machine.

`syntheses` and `estimate` are pure; `calibrate` times a few steps of each kind of work. Ray is not started.
"""

import json
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dfkd_ray import devices, distillation, evaluation, synthesis, trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import pruning
from dfkd_ray.config import METHODS, PruningConfig, synthesis_key
from dfkd_ray.sweep.jobs import Job

START_S = 15.0  # Ray, the fleet and the first trial's process; measured on two cores
CAP_S = 20.0
SMALL = 8  # images of a first timing, which says whether the configured batch size can be afforded
MOST_STEPS = 8
Unit = str  # canonical JSON of what decides how long a piece of work takes: `unit_text`


@dataclass(frozen=True)
class Synthesis:
    """One distinct synthesis of a sweep: its key, and how many batches the trials want of it together."""

    key: str
    domain: str
    teacher: Teacher
    config: Any
    num_batches: int
    num_users: int
    num_cached: int = 0

    @property
    def num_to_make(self) -> int:
        """Batches that are not in the cache yet."""
        return max(0, self.num_batches - self.num_cached)


@dataclass(frozen=True)
class Machine:
    """What the work is spread over: `num` GPUs, or CPU cores."""

    num: int
    kind: Literal["GPU", "CPU core"]

    def share(self, num_threads: int) -> float:
        """How much of the machine's units one piece of work takes."""
        return 1.0 if self.kind == "GPU" else float(min(num_threads, self.num))

    def workers(self, num_threads: int) -> int:
        """How many such pieces run at once."""
        return max(1, int(self.num / self.share(num_threads)))


@dataclass(frozen=True)
class Cost:
    """Seconds of a batch's or a trial's fixed part, of a step, and of an image through the network."""

    fixed_s: float = 0.0
    step_s: float = 0.0
    image_s: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Costs by unit of work, and how they were got."""

    costs: Mapping[Unit, Cost]
    wall_s: float
    scaled: frozenset[Unit]  # units too slow for the configured batch size: timed on fewer images, and scaled


@dataclass(frozen=True)
class Estimate:
    """What a sweep costs. Seconds of work are those of one worker on its own; `units_h` is GPU- or core-hours."""

    synthesis_s: float
    trials_s: float
    units_h: float
    unshared_units_h: float  # were every trial to make its own images
    spread_s: float  # all the work, spread evenly over the machine
    waits_s: float  # of the trial that ends last on a machine of its own: until the last batch that it needs,
    longest_s: float  # and from there to its end
    floor_s: float  # that trial's end on a machine without bounds

    @property
    def wall_s(self) -> float:
        """Seconds from start to end."""
        return START_S + max(self.spread_s, self.waits_s + self.longest_s) if self.floor_s else 0.0

    @property
    def bound(self) -> Literal["work", "images", "trial"]:
        """What decides `wall_s`: all the work; or one trial, the greater part of it its wait for images, or itself."""
        if self.spread_s >= self.waits_s + self.longest_s:
            return "work"
        return "images" if self.waits_s > self.longest_s else "trial"


def syntheses(jobs: Iterable[Job], num_cached: Callable[[str], int] = lambda _key: 0) -> list[Synthesis]:
    """Every distinct synthesis that these trials read, reference sets included; real images are none."""
    found: dict[str, Synthesis] = {}
    for job in jobs:
        for domain, config, num_images in wanted(job):
            key = synthesis_key(job.teacher.hash, config, domain)
            num_batches = -(-num_images // config.batch_size)
            before = found.get(key)
            users = 1 + (before.num_users if before else 0)
            num_batches = max(num_batches, before.num_batches if before else 0)
            cached = before.num_cached if before else num_cached(key)
            found[key] = Synthesis(key, domain, job.teacher, config, num_batches, users, cached)
    return list(found.values())


def wanted(job: Job) -> list[tuple[str, Any, int]]:
    """(domain, config, images) of what a trial has synthesised, as `trial.steps` asks for it."""
    config = job.config
    needs: list[tuple[str, Any, int]] = [("reference", config.reference.synthesis, config.reference.num_images)]
    if METHODS[config.synthesis.method].is_data_free:
        needs.append(("train", config.synthesis, max(config.distillation.num_images, config.bn_num_images)))
    return needs


def unit_text(unit: Mapping[str, Any]) -> Unit:
    """The same text for the same unit, in every process and in files. A field that is null is as none."""
    return json.dumps({name: value for name, value in unit.items() if value is not None}, sort_keys=True)


def units(jobs: Iterable[Job]) -> dict[Unit, str]:
    """Every distinct unit of work in these trials, with its teacher's name."""
    found: dict[Unit, str] = {}
    for job in jobs:
        for _, config, _ in wanted(job):
            found.setdefault(synthesis_unit(job.teacher, config), job.teacher.name)
        found.setdefault(trial_unit(job), job.teacher.name)
    return found


def synthesis_unit(teacher: Teacher, config: Any) -> Unit:
    """What decides how long a batch takes, but for its number of steps."""
    fields = ("method", "batch_size", "num_threads", "storage", *METHODS[config.method].cost_fields)
    given = {name: getattr(config, name, None) for name in fields}
    return unit_text({"work": "synthesis", "teacher_hash": teacher.hash, **given})


def trial_unit(job: Job) -> Unit:
    """What decides how long a distillation step takes: teacher, student, precision, batch size and threads."""
    config, kd = job.config, job.config.distillation
    given = {name: getattr(kd, name) for name in ("precision", "batch_size", "num_threads", "fast")}
    given |= {"features": kd.feature_weight > 0, "device": config.device}
    return unit_text(
        {"work": "trial", "teacher_hash": job.teacher.hash, **config.student.model_dump(mode="json"), **given}
    )


def num_steps(config: Any) -> int:
    """Optimiser steps of a batch."""
    return getattr(config, "num_steps", 0)


def num_forward(job: Job, num_test_images: int) -> int:
    """Images that go through a network once in a trial, beside the distillation steps."""
    config, kd = job.config, job.config.distillation
    looks = 1 + -(-kd.num_steps // kd.eval_every)
    rungs = 3 * num_test_images  # pruned, BatchNorm re-estimated, recovered; the teacher's is known after the first
    # The reference set: the teacher's answers, two rungs and the looks. The pool: teacher's answers, re-estimation.
    return rungs + (3 + looks) * config.reference.num_images + kd.num_images + config.bn_num_images


def estimate(
    jobs: Sequence[Job],
    costs: Mapping[Unit, Cost],
    machine: Machine,
    num_test_images: Mapping[str, int] | None = None,
    num_cached: Callable[[str], int] = lambda _key: 0,
) -> Estimate:
    """Time and GPU- or core-hours of these trials, every distinct synthesis made once.

    `num_test_images` is by the teacher's hash. The work is taken to spread evenly over the machine, but no trial ends
    before the batches of its reference set and then of its own images are made, over all of the machine, and then
    itself has run.
    """
    tests = num_test_images or {}
    synthesis_s = trials_s = units_s = 0.0

    def batch_s(teacher: Teacher, config: Any) -> float:
        cost = costs[synthesis_unit(teacher, config)]
        return cost.fixed_s + num_steps(config) * cost.step_s

    cached: dict[str, int] = {}
    for made in syntheses(jobs, num_cached):
        seconds = made.num_to_make * batch_s(made.teacher, made.config)
        synthesis_s += seconds
        units_s += seconds * machine.share(getattr(made.config, "num_threads", 1))
        cached[made.key] = made.num_cached
    unshared_s = floor_s = 0.0
    longest = (0.0, 0.0, 0.0)  # wait and trial, wait, trial
    for job in jobs:
        cost, kd = costs[trial_unit(job)], job.config.distillation
        num_images = num_forward(job, tests.get(job.teacher.hash, 0))
        seconds = cost.fixed_s + kd.num_steps * cost.step_s + num_images * cost.image_s
        trials_s += seconds
        units_s += seconds * machine.share(kd.num_threads)
        unshared_s += seconds * machine.share(kd.num_threads)
        waits_s = least_s = 0.0
        for domain, config, images in wanted(job):
            one_s, num_batches = batch_s(job.teacher, config), -(-images // config.batch_size)
            threads = getattr(config, "num_threads", 1)
            unshared_s += num_batches * one_s * machine.share(threads)
            left = max(0, num_batches - cached[synthesis_key(job.teacher.hash, config, domain)])
            waits_s += -(-left // machine.workers(threads)) * one_s
            least_s += one_s if left else 0.0
        longest = max(longest, (waits_s + seconds, waits_s, seconds))
        floor_s = max(floor_s, least_s + seconds)
    return Estimate(
        synthesis_s=synthesis_s,
        trials_s=trials_s,
        units_h=units_s / 3600,
        unshared_units_h=unshared_s / 3600,
        spread_s=units_s / machine.num,
        waits_s=longest[1],
        longest_s=longest[2],
        floor_s=START_S + floor_s if jobs else 0.0,
    )


def calibrate(
    jobs: Sequence[Job],
    trust_code: Sequence[str] = (),
    cap_s: float = CAP_S,
    *,
    known: Container[Unit] = (),
    cpu_only: bool = False,
) -> Calibration:
    """Time every distinct unit of work in these trials on this machine, in about `cap_s` seconds altogether.

    Work that would take longer at the configured batch size is timed on fewer images, and scaled. Units that are
    `known` are left out; `cpu_only` times on the CPU what a GPU here would do.
    """
    start = time.perf_counter()
    timed: dict[Unit, Callable[[float], tuple[Cost, bool]]] = {}
    for job in jobs:
        device = torch.device("cpu") if cpu_only else devices.resolve(job.config.device)
        for _, config, _ in wanted(job):
            unit = synthesis_unit(job.teacher, config)
            timed.setdefault(unit, lambda s, t=job.teacher, c=config, d=device: synthesis_cost(t, c, d, s))
        timed.setdefault(trial_unit(job), lambda s, j=job, d=device: trial_cost(j, d, trust_code, s))
    timed = {unit: measure for unit, measure in timed.items() if unit not in known}
    costs: dict[Unit, Cost] = {}
    scaled: set[Unit] = set()
    for position, (unit, measure) in enumerate(timed.items()):
        left = max(0.0, cap_s - (time.perf_counter() - start))
        costs[unit], was_scaled = measure(left / (len(timed) - position))
        scaled |= {unit} if was_scaled else set()
    return Calibration(costs, time.perf_counter() - start, frozenset(scaled))


def synthesis_cost(teacher: Teacher, config: Any, device: torch.device, share_s: float) -> tuple[Cost, bool]:
    """Cost of a batch; without torch.compile, whose own seconds would be all that is seen of it."""

    def ready(steps: int, batch_size: int) -> Callable[[], Any]:
        changes = {"num_steps": steps, "batch_size": batch_size, "compile": False}
        changes = {name: value for name, value in changes.items() if hasattr(config, name)}
        make = synthesis.source(teacher, config.model_copy(update=changes), device)[1]
        return lambda: make(0)

    return per_step(ready, config.batch_size, share_s)


def trial_cost(job: Job, device: torch.device, trust_code: Sequence[str], share_s: float) -> tuple[Cost, bool]:
    """Cost of a trial's steps and of images through its network."""
    config, kd = job.config, job.config.distillation
    runtime = devices.Runtime(device, job.teacher.info.space, kd.precision, kd.num_threads, kd.fast)
    network = trial.on_device(job.teacher.network, device)
    draws = np.random.default_rng(0)

    def images(num: int) -> np.ndarray:
        return draws.integers(0, 256, (num, *job.teacher.info.image_shape), dtype=np.uint8)

    def ready_steps(steps: int, batch_size: int) -> Callable[[], Any]:
        student = trial.starting_student(config, job.teacher, device, trust_code)
        masks = pruning.masks(student, PruningConfig(sparsity=0.5))
        pool = distillation.Pool(images(batch_size), np.zeros(batch_size, np.int64))
        changes = {"num_steps": steps, "batch_size": batch_size, "eval_every": steps, "patience": 0}
        settings = kd.model_copy(update=changes)
        reference = evaluation.reference(network, images(2), runtime)
        pruned = pruning.Pruned(PruningConfig(sparsity=0.5), masks)
        return lambda: distillation.distil(student, network, lambda *_: pool, settings, pruned, reference)

    def ready_images(_steps: int, num: int) -> Callable[[], Any]:
        given = images(num)
        return lambda: evaluation.logits(network, given, runtime)

    with runtime.numerics():
        steps, scaled = per_step(ready_steps, kd.batch_size, 0.7 * share_s)
        forward, forward_scaled = per_step(ready_images, evaluation.EVALUATION_BATCH, 0.3 * share_s, most_steps=1)
    return Cost(0.0, steps.step_s, forward.fixed_s / evaluation.EVALUATION_BATCH), scaled or forward_scaled


def per_step(
    ready: Callable[[int, int], Callable[[], Any]], batch_size: int, share_s: float, most_steps: int = MOST_STEPS
) -> tuple[Cost, bool]:
    """Fixed seconds and seconds per step of `ready(steps, batch_size)()`, and whether they were scaled.

    With `most_steps` 1 all seconds are fixed ones.
    """

    def seconds(steps: int, size: int) -> float:
        run = ready(steps, size)
        start = time.perf_counter()
        with suppress(FloatingPointError):  # the trial will say so; its steps take as long as others
            run()
        return time.perf_counter() - start

    def split(one_s: float, several_s: float, steps: int) -> Cost:
        step_s = (several_s - one_s) / (steps - 1)
        step_s = step_s if step_s > 0 else several_s / steps  # too short for the clock
        return Cost(max(0.0, one_s - step_s), step_s)

    size = min(batch_size, SMALL)
    start = time.perf_counter()
    seconds(1, size)  # the first call of anything is slower
    one_s = seconds(1, size)
    expected_s = one_s * batch_size / size
    while size < batch_size:
        left_s = share_s - (time.perf_counter() - start)
        # The largest size of which one timing, and at the configured size a few, can be afforded.
        next_size = batch_size if 4 * expected_s < left_s else int(size * left_s / (4 * max(one_s, 1e-9)))
        if next_size < min(2 * size, batch_size):
            break
        before, before_s, size = size, one_s, next_size
        one_s = seconds(1, size)
        slope = max(0.0, (one_s - before_s) / (size - before))
        expected_s = one_s + slope * (batch_size - size)
    scale = expected_s / one_s if size < batch_size else 1.0
    if most_steps == 1:
        return Cost(one_s * scale), size < batch_size
    left_s = share_s - (time.perf_counter() - start)
    steps = min(most_steps, max(2, int(left_s / max(one_s, 1e-6))))
    cost = split(one_s, seconds(steps, size), steps)
    return Cost(cost.fixed_s * scale, cost.step_s * scale), size < batch_size
