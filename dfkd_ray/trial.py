"""One whole trial on one machine, without Ray: prune, re-estimate BatchNorm, distil, evaluate → a row.

Real data enters only as arguments: test batches (for reporting) and, when a config asks for `real` images, a source of
them. Neither is opened here.
"""

import hashlib
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dfkd_ray
from dfkd_ray import batchnorm, bundles, cache, devices, distillation, evaluation, models, pruning, synthesis
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig, flat, stable_hash
from dfkd_ray.distillation import Pool, Progress
from dfkd_ray.images import decode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a trial leaves: its row, the student (None if it failed), the images as batches, and the epochs' rows."""

    row: dict[str, Any]
    student: nn.Module | None = None
    student_info: bundles.BundleInfo | None = None
    pruned: tuple[str, ...] = ()
    batches: tuple[Batch, ...] = ()
    epochs: tuple[Mapping[str, float | int], ...] = ()

    def save_student(self, folder: Path) -> bundles.BundleInfo:
        """Write the student as a bundle."""
        assert self.student is not None and self.student_info is not None
        return bundles.save(folder, self.student_info, self.student.state_dict(), self.pruned)


def trial_id(config: TrialConfig, teacher: Teacher) -> str:
    """`t-` and 12 hex digits over the teacher's hash and every field that decides a number of the row."""
    fields = config.model_dump(mode="json", exclude={"teacher": True, "device": True})
    return "t-" + stable_hash({"teacher": teacher.hash, "config": fields})[:12]


def run(
    config: TrialConfig,
    teacher: Teacher,
    *,
    test: Sequence[Batch] | None = None,
    real: BatchSource | None = None,
    cache_folder: Path | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    trust_code: Sequence[str] = (),
) -> Outcome:
    """Run a trial. A loss that is not finite, or memory that runs out, gives a row with status `failed` and the reason.

    `test` is only reported on. `real` is used when, and only when, the config's method is `real`. `ValueError` for a
    config that does not fit the teacher.
    """
    check(config, teacher, trust_code)
    if config.synthesis.method == "real" and real is None:
        raise ValueError(
            "synthesis.method=real needs real images, which this project never opens by itself: "
            "hand them in (command line: --real-data NAME)"
        )
    start = time.perf_counter()
    row = provenance(config, teacher)
    try:
        outcome = steps(config, teacher, row, test, real, cache_folder, checkpoint, progress, trust_code)
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        log.warning("trial %s failed: %s", row["trial_id"], error)
        outcome = Outcome({**row, "status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]})
    outcome.row["wall_s"] = time.perf_counter() - start
    return outcome


def check(config: TrialConfig, teacher: Teacher, trust_code: Sequence[str]) -> None:
    """What can be known to go wrong before anything is computed: `ValueError` with the reason."""
    device = devices.resolve(config.device)
    for settings in (config.synthesis, config.reference.synthesis, config.distillation):
        devices.check_precision(getattr(settings, "precision", "float32"), device, getattr(settings, "fast", False))
    batchnorm.require_layers(teacher.network)  # for the reference set, whatever the trial's own method
    if config.student.architecture is not None:
        starting_student(config, teacher, torch.device("cpu"), trust_code)


def steps(
    config: TrialConfig,
    teacher: Teacher,
    row: dict[str, Any],
    test: Sequence[Batch] | None,
    real: BatchSource | None,
    cache_folder: Path | None,
    checkpoint: Path | None,
    progress: Progress | None,
    trust_code: Sequence[str],
) -> Outcome:
    """The trial itself, top to bottom."""
    device = devices.resolve(config.device)
    kd, space = config.distillation, teacher.info.space
    network = on_device(teacher.network, device)
    report = progress or (lambda _stage, _done, _total, _shown: None)

    with devices.numerics(kd.precision, device, kd.num_threads, kd.fast):
        # The student as it stands on each rung before training.
        student = starting_student(config, teacher, device, trust_code)
        masks: pruning.Masks = {}
        if config.pruning.sparsity > 0:
            masks = pruning.masks(student, config.pruning)
        dense = deepcopy(student)
        pruning.apply(student, masks)

        reference_batches = gather_reference(config, teacher, device, cache_folder, report, row)
        reference = evaluation.reference(network, reference_batches, space, device, kd.precision)
        batches = gather_images(config, teacher, device, real, cache_folder, report, row)
        pool = Pool(
            np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])
        )
        row |= image_columns(batches, pool, network, config, teacher, device)

        def rung(name: str, net: nn.Module) -> None:
            report("evaluating", 0, 1, {})
            if test is not None:
                row[f"{name}_accuracy"] = evaluation.accuracy(net, test, space, device, kd.precision)
            if name in ("pruned", "bn_reestimated"):
                row[f"{name}_agreement"] = reference.compare(net, space, device, kd.precision)[0]

        row["num_test_images"] = None if test is None else sum(len(batch.labels) for batch in test)
        rung("teacher", network)
        rung("pruned", student)
        reestimate(student, config, pool, teacher, device)
        rung("bn_reestimated", student)

        # Frozen BatchNorm keeps the teacher's statistics; the cubic schedule starts dense, on masks of its own.
        if config.pruning.schedule == "cubic":
            student = dense
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        elif kd.bn_mode == "frozen":
            pruning.apply(dense, masks)
            student = dense
        distillation_start = time.perf_counter()
        state = distillation.distil(
            student,
            network,
            pool,
            kd,
            config.pruning,
            masks,
            reference,
            space,
            device,
            checkpoint=checkpoint / row["trial_id"] if checkpoint else None,
            progress=progress,
        )
        row["distillation_wall_s"] = time.perf_counter() - distillation_start
        rung("recovered", student)

    row |= {
        "agreement": state.best_agreement,
        "reference_kl": state.best_kl,
        "best_step": state.best_step,
        "status": "finished",
    }
    row |= size_columns(student)
    student = devices.place(student, torch.device("cpu"), channels_last=False)
    pruned = tuple(pruning.prunable(student)) if config.pruning.sparsity > 0 else ()
    info = student_info(config, teacher, row)
    return Outcome(row, student.requires_grad_(False), info, pruned, tuple(batches), tuple(state.epochs))


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy on the device, channels last: the bundle's own network is never touched."""
    return devices.place(bundles.freeze(deepcopy(network)), device)


def starting_student(
    config: TrialConfig, teacher: Teacher, device: torch.device, trust_code: Sequence[str]
) -> nn.Module:
    """The teacher's copy, or a new network whose initial weights follow distillation.seed."""
    if config.student.architecture is None:
        return on_device(teacher.network, device).requires_grad_(True)
    module_name, colon, _ = config.student.architecture.partition(":")
    if colon and module_name not in trust_code:
        raise ValueError(
            f"student.architecture={config.student.architecture!r} is code; if you trust that module, "
            f"add --trust-code {module_name}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.distillation.seed)
        network = models.build(
            config.student.architecture,
            config.student.arguments,
            num_classes=teacher.info.num_classes,
            image_shape=teacher.info.image_shape,
        )
    return on_device(network, device).requires_grad_(True)


def gather_reference(
    config: TrialConfig,
    teacher: Teacher,
    device: torch.device,
    cache_folder: Path | None,
    report: Progress,
    row: dict[str, Any],
) -> list[Batch]:
    """The held-out reference batches: of the reference config, in a seed domain that no training image comes from."""
    settings = config.reference.synthesis
    key, make = synthesis.source(teacher, settings, device, domain="reference")
    num = -(-config.reference.num_images // settings.batch_size)
    batches, _ = fetch(key, make, num, device, cache_folder, "reference set", report)
    row["reference_wall_s"] = sum(float(batch.terms["wall_s"]) for batch in batches)
    return batches


def gather_images(
    config: TrialConfig,
    teacher: Teacher,
    device: torch.device,
    real: BatchSource | None,
    cache_folder: Path | None,
    report: Progress,
    row: dict[str, Any],
) -> list[Batch]:
    """The images to distil on and to re-estimate BatchNorm with: whole batches, in order."""
    settings, wanted = config.synthesis, max(config.distillation.num_images, config.bn_num_images)
    num = -(-wanted // settings.batch_size)
    if settings.method == "real":
        assert real is not None
        batches, cached = [real(index) for index in range(num)], 0
        key = batches[0].key
    else:
        key, make = synthesis.source(teacher, settings, device)
        batches, cached = fetch(key, make, num, device, cache_folder, "synthesising", report)
    row |= {
        "synthesis_key": key,
        "num_cached_batches": cached,
        "synthesis_wall_s": sum(float(batch.terms.get("wall_s", 0.0)) for batch in batches),
    }
    return batches


def fetch(
    key: str,
    make: BatchSource,
    num_batches: int,
    device: torch.device,
    cache_folder: Path | None,
    stage: str,
    report: Progress,
) -> tuple[list[Batch], int]:
    """`num_batches` batches through the cache, with progress; and how many of them were there already."""
    folder = cache.folder_of(cache_folder, key, devices.numerics_class(device)) if cache_folder else None
    counts = {True: 0, False: 0}

    def on_batch(batch: Batch, was_cached: bool) -> None:
        counts[was_cached] += 1
        shown = {name: value for name, value in batch.terms.items() if isinstance(value, float)}
        report(stage, sum(counts.values()), num_batches, {**shown, "cached": counts[True]})

    report(stage, 0, num_batches, {})
    return cache.fetch(range(num_batches), key, make, folder, on_batch), counts[True]


def image_columns(
    batches: Sequence[Batch],
    pool: Pool,
    network: nn.Module,
    config: TrialConfig,
    teacher: Teacher,
    device: torch.device,
) -> dict[str, Any]:
    """What the images are: their hash, the teacher's confidence and argmax over them, their BN term."""
    logits = evaluation.logits(network, pool.images, teacher.info.space, device, config.distillation.precision)
    histogram = torch.bincount(logits.argmax(dim=1), minlength=teacher.info.num_classes).tolist()
    bn = [float(batch.terms["bn"]) for batch in batches if "bn" in batch.terms]
    return {
        "num_images": len(pool.labels),
        "images_sha256": hashlib.sha256(pool.images.tobytes()).hexdigest(),
        "image_confidence": float(logits.softmax(dim=1).amax(dim=1).mean()),
        "class_histogram": json.dumps(histogram),
        "image_bn": sum(bn) / len(bn) if bn else None,
    }


def reestimate(student: nn.Module, config: TrialConfig, pool: Pool, teacher: Teacher, device: torch.device) -> None:
    """Re-estimate the student's BatchNorm statistics on the first `bn_num_images` images, as they are."""
    size = config.synthesis.batch_size
    total = min(-(-config.bn_num_images // size) * size, len(pool.labels))

    def images():
        for start in range(0, total, size):
            x = decode(pool.images[start : min(start + size, total)], teacher.info.space, device)
            yield x.contiguous(memory_format=torch.channels_last)

    with devices.autocast(config.distillation.precision, device):
        batchnorm.reestimate(student, images())


def size_columns(student: nn.Module) -> dict[str, Any]:
    """Sparsity, parameter counts and bytes of a student."""
    state = student.state_dict()
    return {
        "achieved_sparsity": pruning.achieved_sparsity(student),
        "num_parameters": sum(parameter.numel() for parameter in student.parameters()),
        "num_nonzero": pruning.num_nonzero(student),
        "dense_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        "stored_bytes": bundles.stored_bytes(state, tuple(pruning.prunable(student))),
    }


def student_info(config: TrialConfig, teacher: Teacher, row: Mapping[str, Any]) -> bundles.BundleInfo:
    """The student's `teacher.json`: the teacher's, but for the architecture and how it was made."""
    changes: dict[str, Any] = {
        "test_accuracy": row.get("recovered_accuracy"),
        "trained": True,
        "notes": {"student_of": teacher.hash, "trial_id": row["trial_id"], "config": config.model_dump(mode="json")},
    }
    if config.student.architecture is not None:
        changes |= {"architecture": config.student.architecture, "arguments": config.student.arguments}
    return teacher.info.model_copy(update=changes)


def provenance(config: TrialConfig, teacher: Teacher) -> dict[str, Any]:
    """The columns known before anything has run."""
    values = flat(config.model_dump(mode="json"))
    values["student.arguments"] = json.dumps(config.student.arguments, sort_keys=True)
    return values | {
        "trial_id": trial_id(config, teacher),
        "teacher_hash": teacher.hash,
        "teacher_architecture": teacher.info.architecture,
        "real_data": config.synthesis.method == "real",
        "package_version": dfkd_ray.__version__,
        "commit": commit(),
        "torch_version": torch.__version__,
        "ray_version": getattr(sys.modules.get("ray"), "__version__", None),
        "numerics": devices.numerics_class(devices.resolve(config.device)),
        "host": socket.gethostname(),
    }


def commit() -> str | None:
    """The commit of the checkout this package runs from, `+` where it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        git: Callable[..., str] = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None
