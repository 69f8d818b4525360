"""Estimates a sweep's cost and wall time from seconds per unit of work, and measures those seconds on this machine.

`syntheses` and `estimate` are pure; `calibrate` times a few steps of each kind of work. Ray is not started.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from dfkd_ray import batchnorm, devices, distillation, evaluation, synthesis, trial
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import pruning
from dfkd_ray.config import METHODS, PruningConfig, TrialConfig, stable_hash, synthesis_key
from dfkd_ray.sweep.jobs import Job
from dfkd_ray.trial import reconstruction

START_S = 15.0  # Ray, the fleet and the first trial's process; measured on two cores
CAP_S = 20.0
SMALL = 2  # images of a first timing
MOST_STEPS = 8
# Seconds of layer-wise reconstruction, over those of its images once through teacher and student. Most of the rest are
# normal equations. Measured in CPU seconds of one thread (AMD EPYC, AVX2): 2.9 with 512 images and 2.5 with 1,024 for
# the bundled ResNet-20, 3.2 and 4.0 with 1,024 for the ResNet-8 and a ResNet-18 of width 32. It is more where bfloat16
# is faster than float32, which reconstruction takes; there it was not measured, nor on a GPU.
RECONSTRUCTION = 3.0
# Seconds of writing an ONNX file and its int8 form: most of them are following the network, on images of any size.
# Measured in CPU seconds of one thread: 2.7 for the bundled ResNet-8, 5.7 for the ResNet-20.
INT8_S = 6.0
Unit = str  # what decides how long a piece of work takes, as text: `unit_of`
Kind = Literal["GPU", "CPU core"]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, one worker on its own; of a trial also those of an image once through a network.

    A batch of a method without steps is one step. `scaled`: timed on fewer images than the batch size, and scaled.
    """

    step_s: Seconds
    image_s: Seconds = 0.0
    scaled: bool = False


@dataclass(frozen=True)
class Synthesis:
    """One distinct synthesis: its key, how many batches of it so many trials want, and how many of these are cached."""

    key: str
    domain: str
    teacher: Teacher
    config: Any
    num_batches: int
    num_users: int = 0
    num_cached: int = 0

    def batch_s(self, costs: "Costs") -> float:
        """Seconds of a batch."""
        return costs[unit_of(self)].step_s * getattr(self.config, "num_steps", 1)


Costs = Mapping[Unit, Cost]
Work = Job | Synthesis


@dataclass(frozen=True)
class Machine:
    """What the work is spread over: `num` GPUs, or CPU cores."""

    num: int
    kind: Kind

    def share(self, config: Any) -> int:
        """How many of them one piece of work takes: a whole GPU, or a core for each thread."""
        return 1 if self.kind == "GPU" else min(getattr(config, "num_threads", 1), self.num)


@dataclass(frozen=True)
class Estimate:
    """What a sweep costs, in GPU- or core-hours, and how long it takes, in seconds."""

    synthesis_h: float
    trials_h: float
    unshared_h: float  # of synthesis, were every trial to make its own images
    wall_s: float
    bound: Literal["work", "images", "trial"]  # all the work; one trial, more than half of it its wait; one trial
    waits_s: float  # of the trial that ends last on a machine of its own: until the last batch that it needs,
    longest_s: float  # and from there to its end


def wanted(job: Job) -> Iterator[Synthesis]:
    """What a trial has synthesised, as `trial.steps` asks for it; the cache is not looked into."""
    config, teacher = job.config, job.teacher
    sets: dict[str, tuple[Any, int]] = {"reference": (config.reference.synthesis, config.reference.num_images)}
    if METHODS[config.synthesis.method].is_data_free:
        reestimates = config.student.architecture is not None or bool(batchnorm.layers(teacher.network))
        sets["train"] = (config.synthesis, trial.batches_wanted(config, reestimates)[1] * config.synthesis.batch_size)
    for domain, (own, num_images) in sets.items():
        row = METHODS[own.method]
        rounds = 1 if row.is_stationary else own.num_rounds
        num_batches = rounds * -(-num_images // (own.batch_size * rounds))
        key = synthesis_key(teacher.hash, own, domain)
        if row.looks_at_student(own):  # its images are this trial's alone
            key = stable_hash({"of": key, "trial": job.id})
        yield Synthesis(key, domain, teacher, own, num_batches)


def syntheses(jobs: Iterable[Job], num_cached: Callable[[str], int] = lambda _key: 0) -> list[Synthesis]:
    """Every distinct synthesis that these trials read, reference sets included; real images are none."""
    found: dict[str, Synthesis] = {}
    for job in jobs:
        for own in wanted(job):
            before = found.get(own.key, own)
            most = max(own.num_batches, before.num_batches)
            found[own.key] = replace(before, num_batches=most, num_users=before.num_users + 1)
    return [replace(made, num_cached=min(made.num_batches, num_cached(key))) for key, made in found.items()]


def unit_of(one: Work) -> Unit:
    """What decides how long a step of a trial or a batch takes: the same text in every process and in files."""
    config: Any = one.config
    if isinstance(one, Synthesis):
        names = {"method", "batch_size", "num_threads", "storage", *METHODS[config.method].cost_fields}
        work, fields = "synthesis", config.model_dump(mode="json", include=names)
    else:
        kd, names = config.distillation, {"precision", "batch_size", "num_threads", "fast"}
        work, fields = "trial", kd.model_dump(mode="json", include=names)
        fields |= config.student.model_dump(mode="json", exclude={"weights"})
        fields |= {"device": config.device, "features": kd.feature_weight > 0}
    texts = (f"{name}={json.dumps(value, sort_keys=True)}" for name, value in fields.items())
    return " ".join((work, one.teacher.hash, *texts))


def trial_s(job: Job, costs: Costs, num_test_images: int) -> float:
    """Seconds of a trial: its distillation steps, and images that go through a network once beside them."""
    config, kd, cost = job.config, job.config.distillation, costs[unit_of(job)]
    looks, before = 1 + -(-kd.num_steps // kd.eval_every), 2  # rungs before training: pruned, BatchNorm re-estimated
    num_images = kd.num_images + config.bn_num_images  # the pool: the teacher's answers, re-estimation
    if reconstruction.applies(config):
        before += 1
        num_images += round(RECONSTRUCTION * 2 * config.reconstruction.num_images)
        num_images += 3 * config.reference.num_images if config.reselects else 0  # whether the fit can be trusted
    # The reference set: the teacher's answers, the rungs before training and the looks.
    num_images += (1 + before + looks) * config.reference.num_images
    num_images += (before + 1) * num_test_images  # these and recovered; the teacher's is known after the first
    steps, fixed_s = kd.num_steps, 0.0
    if config.quantisation.int8:
        num_images += 2 * config.reference.num_images + num_test_images  # the float32 file and the int8 one
        fixed_s = INT8_S
        if config.quantisation.distil_above is not None:
            steps, fixed_s = steps + config.quantisation.num_steps, 2 * INT8_S
    return steps * cost.step_s * share_of_step(config) + num_images * cost.image_s + fixed_s


def share_of_step(config: TrialConfig) -> float:
    """A distillation step, over the one of the dense student that is timed.

    The teacher's forward pass is a quarter of that. The rest shrinks with a student's channels, here by their sparsity,
    whatever it is the share of: which multiplications go with parameters or seconds is known when the channels are.
    """
    removed = config.pruning.sparsity if config.pruning.structure == "channels" else 0.0
    return 1 - 0.75 * removed


def estimate(
    jobs: Sequence[Job], made: Sequence[Synthesis], costs: Costs, machine: Machine, num_test_images: Mapping[str, int]
) -> Estimate:
    """What at least one trial costs, `made` being its `syntheses`, with so many test images by the teacher's hash.

    The work is taken to spread evenly over the machine, but no trial ends before the batches of its reference set and
    then of its own images are made, over all of the machine, and then itself has run.
    """
    cached = {one.key: one.num_cached for one in made}
    to_make = ((one.num_batches - one.num_cached) * one.batch_s(costs) * machine.share(one.config) for one in made)
    synthesis_s, trials_s, unshared_s = sum(to_make), 0.0, 0.0
    ends = []
    for job in jobs:
        own_s, waits_s = trial_s(job, costs, num_test_images.get(job.teacher.hash, 0)), 0.0
        trials_s += own_s * machine.share(job.config.distillation)
        for one in wanted(job):
            batch_s, share = one.batch_s(costs), machine.share(one.config)
            unshared_s += one.num_batches * batch_s * share
            waits_s += -(-max(0, one.num_batches - cached[one.key]) // (machine.num // share)) * batch_s
        ends.append((waits_s + own_s, waits_s, own_s))
    last_s, waits_s, own_s = max(ends)
    spread_s = (synthesis_s + trials_s) / machine.num
    bound = "work" if spread_s >= last_s else "images" if waits_s > own_s else "trial"
    wall_s = START_S + max(spread_s, last_s)
    return Estimate(synthesis_s / 3600, trials_s / 3600, unshared_s / 3600, wall_s, bound, waits_s, own_s)


def calibrate(
    todo: Mapping[Unit, Work], device: torch.device, cap_s: float, trust_code: Sequence[str] = ()
) -> dict[Unit, Cost]:
    """Time these units of work on a device of this machine, in about `cap_s` seconds altogether."""
    end = time.perf_counter() + cap_s
    costs: dict[Unit, Cost] = {}
    for unit, one in todo.items():
        share_s = (end - time.perf_counter()) / (len(todo) - len(costs))
        if isinstance(one, Synthesis):
            costs[unit] = synthesis_cost(one, device, share_s)
        else:
            own = torch.device("cpu") if one.config.device == "cpu" else device
            costs[unit] = trial_cost(one, own, trust_code, share_s)
    return costs


def synthesis_cost(one: Synthesis, device: torch.device, share_s: float) -> Cost:
    """Cost of a batch's steps; without torch.compile, whose own seconds would be all that is seen of it."""

    def ready(steps: int, batch_size: int) -> Callable[[], Any]:
        changes = {"num_steps": steps, "batch_size": batch_size, "compile": False}
        changes = {name: value for name, value in changes.items() if hasattr(one.config, name)}
        config, state = synthesis.first_round(one.teacher, one.config.model_copy(update=changes))
        make = synthesis.source(one.teacher, config, device, state=state)[1]
        return lambda: [make(index) for index in range(1 if "num_steps" in changes else steps)]

    return per_step(ready, one.config.batch_size, share_s)


def trial_cost(job: Job, device: torch.device, trust_code: Sequence[str], share_s: float) -> Cost:
    """Cost of a trial's steps and of images through its network."""
    kd = job.config.distillation
    runtime = devices.Runtime(device, job.teacher.info.space, kd.precision, kd.num_threads, kd.fast)
    network = trial.on_device(job.teacher.network, device)
    shape = (max(kd.batch_size, evaluation.EVALUATION_BATCH), *job.teacher.info.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def ready_steps(steps: int, batch_size: int) -> Callable[[], Any]:
        student = trial.starting_student(job.config, job.teacher, device, trust_code)
        pruned = pruning.Pruned(PruningConfig(), {})  # the masks' part of a step is next to nothing
        pool = distillation.Pool(images[:batch_size], np.zeros(batch_size, np.int64))
        changes = {"num_steps": steps, "batch_size": batch_size, "eval_every": steps, "patience": 0}
        settings, reference = kd.model_copy(update=changes), evaluation.reference(network, images[:2], runtime)
        return lambda: distillation.distil(student, network, lambda *_: pool, settings, pruned, reference)

    def ready_images(steps: int, num: int) -> Callable[[], Any]:
        return lambda: [evaluation.logits(network, images[:num], runtime).cpu() for _ in range(steps)]

    with runtime.numerics():
        steps = per_step(ready_steps, kd.batch_size, 0.7 * share_s)
        forward = per_step(ready_images, evaluation.EVALUATION_BATCH, 0.3 * share_s)
    return Cost(steps.step_s, forward.step_s / evaluation.EVALUATION_BATCH, steps.scaled or forward.scaled)


def per_step(ready: Callable[[int, int], Callable[[], Any]], batch_size: int, share_s: float) -> Cost:
    """Seconds per step of `ready(steps, batch_size)()`, but for what it does once, got in about `share_s` seconds.

    Timed with few images, then with four times as many for as long as a few steps of that can be afforded. Where the
    batch size is not reached, further images are taken to cost what the last ones did.
    """

    def seconds(steps: int, size: int) -> float:
        run = ready(steps, size)
        begin = time.perf_counter()
        with suppress(FloatingPointError):  # the trial will say so; its steps take as long as others
            run()
        return time.perf_counter() - begin

    end, size, image_s = time.perf_counter() + share_s, min(batch_size, SMALL), 0.0
    seconds(1, min(batch_size, 4 * SMALL))  # the first call of anything is slower
    one_s = seconds(1, size)
    while size < batch_size:
        more = min(3 * size, batch_size - size)
        if size > SMALL and time.perf_counter() + 4 * (one_s + more * image_s) > end:
            break
        before_s, one_s = one_s, seconds(1, size + more)
        image_s, size = max(0.0, one_s - before_s) / more, size + more
    steps = min(MOST_STEPS, max(2, int((end - time.perf_counter()) / one_s)))
    several_s = seconds(steps, size)
    step_s = (several_s - one_s) / (steps - 1) if several_s > one_s else several_s / steps  # too short for the clock
    return Cost(step_s * (1 + (batch_size - size) * image_s / one_s), scaled=size < batch_size)
