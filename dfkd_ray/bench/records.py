"""Benchmark of activation records: recording, and reconstruction against DeepInversion and the bare network.

The images are noise, because the costs do not depend on their content.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_ray import batchnorm, bundles, devices, models
from dfkd_ray.bench.recipe import bare_steps, synchronise
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import DeepInversionConfig, RecordsConfig
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.records import finishing, fitting, format, taps
from dfkd_ray.report.wording import base_name
from dfkd_ray.results.measurements import Row
from dfkd_ray.synthesis import deepinversion
from dfkd_ray.synthesis import reconstruction as by_records
from dfkd_ray.synthesis.optimiser import Aim


def untrained(
    architecture: str,
    image_shape: tuple[int, ...],
    num_classes: int,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Teacher:
    """A teacher with random weights."""
    torch.manual_seed(0)
    network = models.build(architecture, dict(arguments), num_classes=num_classes, image_shape=image_shape)
    channels = image_shape[0]
    info = bundles.BundleInfo(
        architecture=architecture,
        arguments=dict(arguments),
        num_classes=num_classes,
        input_shape=image_shape,  # type: ignore[arg-type]  # checked there
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        trained=False,
    )
    return Teacher(bundles.freeze(network), info, bundles.teacher_hash(info), architecture)


def noise(indices: Tensor, image_shape: Sequence[int]) -> Tensor:
    """uint8 images, each a function of its index."""
    generator = torch.Generator().manual_seed(int(indices[0]))
    return torch.randint(0, 256, (len(indices), *image_shape), dtype=torch.uint8, generator=generator)


def fit(teacher: Teacher, kinds: Sequence[str], num_images: int, num_threads: int) -> None:
    """Record each kind into `teacher.records`, and print seconds, size and peak memory."""
    labels = torch.arange(num_images) % teacher.info.num_classes
    rows = np.arange(num_images)
    print(f"recording {num_images:,} images of {'x'.join(map(str, teacher.info.image_shape))}, {num_threads} threads:")
    for kind in kinds:
        start = time.perf_counter()
        with devices.numerics("float32", torch.device("cpu"), num_threads):
            plan = fitting.plan(teacher, labels.numpy(), rows, [kind])
        planned_s = time.perf_counter() - start
        shape = teacher.info.image_shape
        (shard,) = fitting.shards(lambda chosen: noise(chosen, shape), labels, rows, 1)  # noqa: B023 - used at once
        totals = fitting.fit(plan, teacher.network, shard, num_threads)
        (record,) = finishing.finish(plan, totals, teacher)
        del totals
        size = fitting.size_bytes(record)
        wall_s, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        dense = fitting.dense_bytes(plan.taps, teacher.info.num_classes)
        teacher.records[kind] = format.from_arrays(format.to_arrays(record))
        print(
            f"  {kind:15}{wall_s:7.1f} s, of that {planned_s:.1f} for its bases; {size / 1e6:.2f} MB, dense "
            f"covariances {dense / size:.0f} x; most memory so far {peak:.2f} GB",
            flush=True,
        )


def reconstruction(
    teacher: Teacher, kinds: Sequence[str], batch_size: int, num_steps: int, repeats: int, num_threads: int
) -> list[Row]:
    """Print and return images·steps per second of each kind, the bare network, and DeepInversion if it is possible."""
    device = torch.device("cpu")
    network, shape = deepcopy(teacher.network), teacher.info.image_shape
    found = taps.find(network, shape)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(batch_size) % teacher.info.num_classes
    settings = RecordsConfig(batch_size=batch_size, num_steps=num_steps, num_threads=num_threads)
    parts = by_records.initial_parts(settings, shape, generator, device)
    images = parts[0].clone()

    def side(kind: str) -> Callable[[], None]:
        record = teacher.record(kind)
        targets = by_records.targets_of(record, by_records.draw(record, labels, generator), residual=True)
        config = settings.model_copy(update={"record": kind})

        def run() -> None:
            by_records.reconstruct(network, found, record, config, teacher.info.space, parts, targets, labels)

        return run

    sides: dict[str, Callable[[], None]] = {
        "bare network, float32": lambda: bare_steps(network, images, labels, "float32", num_steps)
    }
    sides |= {f"records, {kind}": side(kind) for kind in kinds}
    if batchnorm.layers(network):
        inversion = DeepInversionConfig(
            batch_size=batch_size, num_steps=num_steps, num_threads=num_threads, precision="float32"
        )
        inversion = deepinversion.pin(teacher, inversion)
        own = deepinversion.initial_parts(inversion, shape, generator, device)
        space = teacher.info.space
        sides["DeepInversion, float32"] = lambda: (
            deepinversion.invert(network, network, inversion, space, own, Aim(labels, SOFTMAX), generator) and None
        )
    times: dict[str, list[float]] = {name: [] for name in sides}
    with devices.numerics("float32", device, num_threads):
        for run in sides.values():
            run()
        for _ in range(repeats):
            for name, run in sides.items():
                synchronise(device)
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    rates = {name: batch_size * num_steps / statistics.median(taken) for name, taken in times.items()}
    print(f"reconstruction, batch {batch_size}, {num_steps} steps a run, median of {repeats}; images·steps/s:")
    bare = rates["bare network, float32"]
    for name, rate in rates.items():
        print(f"  {name:27}{rate:9,.0f}, {rate / bare:.2f} x the bare network")
    setting = {"network": base_name(teacher.name), "batch_size": batch_size, "threads": num_threads}
    return [
        Row({**setting, "side": name}, {"images_steps_per_s": rate, "to_bare": rate / bare})
        for name, rate in rates.items()
    ]
