"""Benchmarks of synthesis and recovery against a plain reference, measured in one run on the same teacher.

The reference implementation is in this module: eager float32, one forward hook per BatchNorm layer, no channels_last,
with the public recipe of Tripurwar et al. 2025 (arXiv 2511.20702), written from its published settings. The recipe does
not say whether the teacher is frozen and in eval mode; here it is, which only makes the reference faster.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, evaluation, models, trial
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import BundleInfo, Teacher, freeze, teacher_hash
from dfkd_ray.compression import pruning
from dfkd_ray.config import DeepInversionConfig, PruningConfig, TrialConfig
from dfkd_ray.distillation import Progress
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.report.wording import base_name
from dfkd_ray.results.measurements import Row
from dfkd_ray.synthesis import deepinversion
from dfkd_ray.synthesis.optimiser import Aim

RECIPE = {"num_images": 1024, "batch_size": 32, "num_steps": 200, "num_epochs": 15, "temperature": 3.0}


def default_teacher() -> Teacher:
    """An untrained ResNet-18 with CIFAR stem at width 32 on 1x32x32: speed does not depend on the weights."""
    arguments = {"stem": "cifar", "width_multiplier": 0.5}
    torch.manual_seed(0)
    network = models.build("resnet18", arguments, num_classes=10, image_shape=(1, 32, 32))
    info = BundleInfo(
        architecture="resnet18",
        arguments=arguments,
        num_classes=10,
        input_shape=(1, 32, 32),
        mean=(0.3,),
        std=(0.35,),
        trained=False,
    )
    return Teacher(freeze(network), info, teacher_hash(info), "untrained resnet18, width 32")


@contextmanager
def hooked(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list; a forward hook per BatchNorm layer adds its layer's distance (the reference implementation)."""
    distances: list[Tensor] = []

    def hook(layer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = inputs[0].float()
        dims = [0, *range(2, x.ndim)]
        mean, variance = x.mean(dims), x.var(dims, unbiased=False)
        distances.append(
            torch.linalg.vector_norm(mean - layer.running_mean) + torch.linalg.vector_norm(variance - layer.running_var)
        )

    handles = [layer.register_forward_hook(hook) for layer in batchnorm.layers(network)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def reference_inversion(network: nn.Module, images: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
    """The recipe's synthesis of one batch: entropy + 10 BN + 1e-5 summed TV, Adam lr 0.05, jitter, clamp to [-3, 3]."""
    images = images.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([images], lr=0.05)
    with hooked(network) as distances:
        for _ in range(num_steps):
            distances.clear()
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            logits = network(torch.roll(images, (dy, dx), dims=(2, 3)))
            log_p = F.log_softmax(logits, dim=1)
            entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
            tv = (images[:, :, 1:] - images[:, :, :-1]).abs().sum() + (
                images[:, :, :, 1:] - images[:, :, :, :-1]
            ).abs().sum()
            loss = entropy + 10.0 * torch.stack(distances).sum() + 1e-5 * tv
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                images.clamp_(-3.0, 3.0)
    return images.detach()


def reference_distillation(
    student: nn.Module, teacher: nn.Module, images: Tensor, masks: pruning.Masks, num_epochs: int, seed: int
) -> None:
    """The recipe's distillation: SGD lr 1e-3 momentum 0.9, T = 3, KL without T², BatchNorm frozen, masks kept."""
    student.eval().requires_grad_(True)
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    temperature, size = RECIPE["temperature"], int(RECIPE["batch_size"])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(images), generator=generator).split(size):
            x = images[rows]
            with torch.no_grad():
                target = F.softmax(teacher(x) / temperature, dim=1)
            loss = F.kl_div(F.log_softmax(student(x) / temperature, dim=1), target, reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            pruning.apply(student, masks)


def bare_steps(network: nn.Module, images: Tensor, labels: Tensor, precision: str, num_steps: int) -> None:
    """Forward and backward of the network only, without statistics and optimiser: the upper limit of the speed."""
    images = images.clone(memory_format=torch.channels_last).requires_grad_(True)
    for _ in range(num_steps):
        with devices.autocast(precision, images.device):
            logits = network(images).float()
        torch.autograd.grad(F.cross_entropy(logits, labels), images)


def inversion(
    teacher: Teacher, config: DeepInversionConfig, *, steps: int, repeats: int, device_name: str
) -> list[Row]:
    """Print and return images·steps per second of reference, bare network and ours, and ratios; medians of runs."""
    device, config = devices.resolve(device_name), deepinversion.pin(teacher, config)
    plain = freeze(deepcopy(teacher.network)).to(device)
    ours = trial.on_device(teacher.network, device)
    run = deepinversion.compiled(ours) if config.compile else ours
    space = teacher.info.space
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch_size, *teacher.info.image_shape, generator=generator).to(device)
    parts = deepinversion.initial_parts(config, teacher.info.image_shape, generator, device)
    labels = (torch.arange(config.batch_size) % teacher.info.num_classes).to(device)

    def run_reference(num: int) -> None:
        with devices.numerics("float32", device, config.num_threads):
            reference_inversion(plain, images, num, generator)

    def run_bare(num: int) -> None:
        with devices.numerics(config.precision, device, config.num_threads):
            bare_steps(ours, images, labels, config.precision, num)

    def run_ours(num: int) -> None:
        with devices.numerics(config.precision, device, config.num_threads):
            settings = config.model_copy(update={"num_steps": num})
            deepinversion.invert(ours, run, settings, space, parts, Aim(labels, SOFTMAX), generator)

    sides: dict[str, Callable[[int], None]] = {"reference": run_reference, "bare": run_bare, "ours": run_ours}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(2)
    for _ in range(repeats):
        for name, side in sides.items():
            synchronise(device)
            start = time.perf_counter()
            side(steps)
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    rates = {name: config.batch_size * steps / statistics.median(values) for name, values in times.items()}
    print(f"bench inversion: {teacher.name}, batch {config.batch_size}, {steps} steps a run, median of {repeats}")
    print(f"machine: {devices.numerics_class(device)}, {config.num_threads} threads")
    spread = {name: (max(values) - min(values)) / statistics.median(values) for name, values in times.items()}
    described = {
        "reference": "eager float32, forward hooks",
        "bare": f"forward + backward alone, {config.precision}",
        "ours": f"{config.precision}{', compiled' if config.compile else ''}",
    }
    for name, what in described.items():
        print(f"  {name:10}{rates[name]:9.0f} images·steps/s  (spread {100 * spread[name]:.0f} %)  {what}")
    to_reference, to_bare = (rates["ours"] / rates[other] for other in ("reference", "bare"))
    print(f"  ours / reference {to_reference:.2f}   ours / bare {to_bare:.2f}")
    setting = {"network": base_name(teacher.name), "batch_size": config.batch_size, "threads": config.num_threads}
    return [
        Row(
            {**setting, "side": name},
            {"images_steps_per_s": rate, **{f"to_{other}": rate / rates[other] for other in ("reference", "bare")}},
        )
        for name, rate in rates.items()
    ]


def synchronise(device: torch.device) -> None:
    """Wait for the device's pending work before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recovery(
    teacher: Teacher,
    config: TrialConfig,
    test: Sequence[Batch],
    sparsities: Sequence[float],
    *,
    scale: float,
    seed: int,
    progress: Progress,
) -> list[Row]:
    """Print and return points lost and seconds of the recipe and of ours, per sparsity.

    The seconds are those of one whole recovery: synthesis, pruning and distillation, without test evaluation. The
    recipe's images are made once, and their time is counted for every sparsity; ours are made again each time.
    """
    device = devices.resolve(config.device)
    kd = config.distillation
    plain_runtime = devices.Runtime(device, teacher.info.space, "float32", kd.num_threads)
    network = trial.on_device(teacher.network, device)
    base = evaluation.accuracy(network, test, plain_runtime)
    print(f"bench recovery: {teacher.name}, test accuracy {100 * base:.2f} %, seed {seed}", flush=True)
    print(f"machine: {devices.numerics_class(device)}, {kd.num_threads} threads")

    ours = []
    for sparsity in sparsities:
        pruned = config.pruning.model_copy(update={"sparsity": sparsity})
        start = time.perf_counter()
        outcome = trial.run(config.model_copy(update={"pruning": pruned}), teacher, observer=trial.Observer(progress))
        wall = time.perf_counter() - start
        if outcome.student is None:
            raise FloatingPointError(f"bench recovery at sparsity {sparsity}: {outcome.row['reason']}")
        runtime = replace(plain_runtime, precision=kd.precision)
        accuracy = evaluation.accuracy(trial.on_device(outcome.student, device), test, runtime)
        ours.append((accuracy, wall))
        print(f"  ours    {sparsity:.2f}: lost {100 * (base - accuracy):6.2f} points, {wall:7.1f} s", flush=True)

    rows, ratios = [], []
    with devices.numerics("float32", device, kd.num_threads):
        start = time.perf_counter()
        plain = freeze(deepcopy(teacher.network)).to(device)
        images = recipe_images(plain, teacher.info.image_shape, scale, seed, device, progress)
        synthesis_s = time.perf_counter() - start
        for sparsity, (our_accuracy, our_wall) in zip(sparsities, ours, strict=True):
            start = time.perf_counter()
            student = deepcopy(plain)
            masks = pruning.masks(student, PruningConfig(criterion="global_magnitude", sparsity=sparsity))
            pruning.apply(student, masks)
            epochs = max(1, round(RECIPE["num_epochs"] * scale))
            reference_distillation(student, plain, images, masks, epochs, seed)
            wall = synthesis_s + time.perf_counter() - start
            accuracy = evaluation.accuracy(student, test, plain_runtime)
            print(f"  recipe  {sparsity:.2f}: lost {100 * (base - accuracy):6.2f} points, {wall:7.1f} s", flush=True)
            for side, reached, taken in (("ours", our_accuracy, our_wall), ("recipe", accuracy, wall)):
                labels = {"network": base_name(teacher.name), "sparsity": sparsity, "side": side}
                numbers = {"points_lost": 100 * (base - reached), "wall_s": taken, "recipe_to_this": wall / taken}
                rows.append(Row(labels, numbers, seed))
            ratios.append(f"  sparsity {sparsity:.2f}: recipe / ours wall time {wall / our_wall:.1f}")
    for line in ratios:
        print(line)
    return rows


def recipe_images(
    network: nn.Module,
    image_shape: Sequence[int],
    scale: float,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """The recipe's images, normalised float32; `scale` shrinks their number and steps."""
    size = int(RECIPE["batch_size"])
    num_batches = max(1, round(RECIPE["num_images"] * scale / size))
    num_steps = max(1, round(RECIPE["num_steps"] * scale))
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(num_batches):
        start = torch.randn(size, *image_shape, generator=generator).to(device)
        batches.append(reference_inversion(network, start, num_steps, generator))
        progress("recipe's images", index + 1, num_batches, {})
    return torch.cat(batches)
