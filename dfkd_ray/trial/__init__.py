"""One whole trial on one machine, without Ray: prune, re-estimate BatchNorm (if any), distil, evaluate → a row.

Real data enters only as arguments: test batches (for reporting) and, when a config asks for `real` images, a source of
them. Neither is opened here.
"""

import hashlib
import json
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import dfkd_ray
from dfkd_ray import batchnorm, bundles, cache, commit, devices, distillation, evaluation, models, storage, synthesis
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import pruning
from dfkd_ray.config import TrialConfig, columns_of, stable_hash, versions
from dfkd_ray.distillation import OnEpochs, Pool, Progress, State
from dfkd_ray.images import decoded
from dfkd_ray.storage import Folder, Where

log = logging.getLogger(__name__)
OnBatch = Callable[[Batch, bool], None]
TRIAL_ID = re.compile(r"t-[0-9a-f]{12}")
CHECKPOINTS = "checkpoints"
# What differs between two runs that fail alike, and what stands for it in a reason.
VARYING = (
    (re.compile(r"(Tried to allocate [\d.]+ \w+)\..*"), r"\1"),  # CUDA goes on with what was free and who had the rest
    (re.compile(r"\b0x[0-9a-fA-F]+"), "0x…"),
    (re.compile(r"\b(pid|process|thread)([ =:]+)\d+", re.IGNORECASE), r"\1\2…"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "…"),
    (re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+"), ""),
)
# Where a trial's synthetic images come from: (teacher, synthesis config, seed domain, indices, device, on_batch) → key.
# `on_batch(batch, found)` gets each batch once, in any order; `found` is false where it was made for this trial.
Images = Callable[[Teacher, Any, str, Sequence[int], torch.device, OnBatch], str]
# What is told at each look at the reference set: the row so far, and where the distillation stands.
OnLook = Callable[[Mapping[str, Any], State], None]


@dataclass(frozen=True)
class Outcome:
    """What a trial leaves: its row, the student (None if it failed), its images, and the rows of other tables."""

    row: dict[str, Any]
    student: nn.Module | None = None
    student_info: bundles.BundleInfo | None = None
    pruned: tuple[str, ...] = ()
    batches: tuple[Batch, ...] = ()
    epochs: tuple[Mapping[str, float | int | None], ...] = ()
    synthesis: tuple[dict[str, Any], ...] = ()

    def save_student(self, folder: Where) -> bundles.BundleInfo:
        """Write the student as a bundle, into a folder or under a URI."""
        assert self.student is not None and self.student_info is not None
        return bundles.save(folder, self.student_info, self.student.state_dict(), self.pruned)


def pinned(config: TrialConfig, teacher: Teacher) -> TrialConfig:
    """The config with the hash of each activation record that it uses: what a trial is named by and images come from.

    Its teacher is open by now, and what is left of a teacher's URI is its public name: from here the config goes into
    rows, files and other processes. A trial's id does not hold it.
    `ValueError` where the teacher has no such record, or another than a hash that is there already.
    """
    update: dict[str, Any] = {"teacher": storage.public_name(config.teacher)}
    for name, settings in (("synthesis", config.synthesis), ("reference", config.reference.synthesis)):
        if settings.method != "records":
            continue
        found = pinned_synthesis(settings, teacher)
        update[name] = found if name == "synthesis" else config.reference.model_copy(update={"synthesis": found})
    return config.model_copy(update=update)


def pinned_synthesis(settings: Any, teacher: Teacher) -> Any:
    """A synthesis config with the hash of the record that it uses, if it uses one."""
    if settings.method != "records":
        return settings
    sha256 = teacher.record(settings.record).sha256
    if settings.record_sha256 not in (None, sha256):
        raise ValueError(
            f"record_sha256 is {settings.record_sha256[:12]}…, the {settings.record} record of {teacher.name} has "
            f"{sha256[:12]}…: it is another one"
        )
    return settings.model_copy(update={"record_sha256": sha256})


def remove_checkpoints(place: Folder, trial_ids: Iterable[str] | None = None) -> None:
    """Remove what these trials (None: all) have under `checkpoints/` of a place, and nothing else there.

    Ids may come out of a table that somebody else has written: what has not the form of one is left alone, and where
    `checkpoints` is a link nothing is removed.
    """
    folder = place / CHECKPOINTS
    if folder.is_local and folder.path.is_symlink():
        return
    wanted = None if trial_ids is None else {name for name in trial_ids if TRIAL_ID.fullmatch(name)}
    for inner in folder.folders() if wanted is None or len(wanted) > 1 else [folder / name for name in wanted]:
        if TRIAL_ID.fullmatch(inner.name) and (wanted is None or inner.name in wanted):
            distillation.remove_checkpoint(inner)
    if wanted is None:
        folder.clear(lambda _name: False)


def trial_id(config: TrialConfig, teacher: Teacher) -> str:
    """`t-` and 12 hex digits over all that decides a number of the row: teacher, config, versions of the algorithms."""
    fields = config.model_dump(mode="json", exclude={"teacher": True, "device": True})
    return "t-" + stable_hash({"teacher": teacher.hash, "config": fields, "versions": versions()})[:12]


def run(
    config: TrialConfig,
    teacher: Teacher,
    *,
    test: Sequence[Batch] | None = None,
    real: BatchSource | None = None,
    images: Images | None = None,
    teacher_accuracy: float | None = None,
    checkpoint: Where | None = None,
    progress: Progress | None = None,
    on_look: OnLook | None = None,
    on_epochs: OnEpochs | None = None,
    trust_code: Sequence[str] = (),
) -> Outcome:
    """Run a trial. A loss that is not finite, or memory that runs out, gives a row with status `failed` and the reason.

    `test` is only reported on. `real` is used when, and only when, the config's method is `real`. `images` gives the
    synthetic ones (default: made here, kept nowhere). `teacher_accuracy`: measured before, on the same test batches in
    the same precision. `checkpoint` is the folder or URI of all trials' checkpoints; `on_epochs` gets the looks at the
    reference set before each is written. `ValueError` for a config that does not fit the teacher.
    """
    check(config, teacher, trust_code)
    config = pinned(config, teacher)
    if config.synthesis.method == "real" and real is None:
        raise ValueError(
            "synthesis.method=real needs real images, which this project never opens by itself: "
            "hand them in (command line: --real-data NAME)"
        )
    start = time.perf_counter()
    row = provenance(config, teacher)
    try:
        source = images or made_here(None)
        folder = storage.folder(checkpoint) / row["trial_id"] if checkpoint else None
        outcome = steps(
            config, teacher, row, test, real, source, teacher_accuracy, folder, progress, on_look, on_epochs, trust_code
        )
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        log.warning("trial %s failed: %s", row["trial_id"], error)
        outcome = Outcome({**row, "status": "failed", "reason": reason_of(error)})
    outcome.row["wall_s"] = time.perf_counter() - start
    return outcome


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error, as a row keeps it: without what differs between two runs of the same trial.

    Process numbers, addresses in memory or on the network, free memory and the folders before a file's name go.
    """
    message = str(error).strip() or "no message"
    reason = f"{type(error).__name__}: {storage.without_secrets(message.splitlines()[0])}"
    for pattern, shown in VARYING:
        reason = pattern.sub(shown, reason)
    return reason[:300]


def check(config: TrialConfig, teacher: Teacher, trust_code: Sequence[str], on_gpu: bool = False) -> None:
    """What can be known to go wrong before anything is computed: `ValueError` with the reason.

    `on_gpu`: it is to run where there is a GPU, whatever this machine has.
    """
    device = torch.device("cuda") if on_gpu and config.device != "cpu" else devices.resolve(config.device)
    for settings in (config.synthesis, config.reference.synthesis, config.distillation):
        devices.check_precision(getattr(settings, "precision", "float32"), device, getattr(settings, "fast", False))
    for name, settings in (("synthesis", config.synthesis), ("reference.synthesis", config.reference.synthesis)):
        if settings.method == "deepinversion":
            try:
                batchnorm.require_layers(teacher.network)
            except ValueError as error:
                raise ValueError(
                    f"{name}.method=deepinversion: {error}; or {name}.method=records, where it has some, or noise"
                ) from None
    student = teacher.network
    if config.student.architecture is not None:
        student = starting_student(config, teacher, torch.device("cpu"), trust_code)
    if config.distillation.bn_mode != "trained" and not batchnorm.layers(student):
        raise ValueError(
            f"distillation.bn_mode={config.distillation.bn_mode} acts on BatchNorm, and the student has none; "
            "set distillation.bn_mode=trained"
        )


def steps(
    config: TrialConfig,
    teacher: Teacher,
    row: dict[str, Any],
    test: Sequence[Batch] | None,
    real: BatchSource | None,
    source: Images,
    teacher_accuracy: float | None,
    checkpoint: Folder | None,
    progress: Progress | None,
    on_look: OnLook | None,
    on_epochs: OnEpochs | None,
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

        held_out = gather_reference(config, teacher, device, source, report)
        row["reference_wall_s"] = held_out.wall_s
        reference = evaluation.reference(network, held_out.pool.images, space, device, kd.precision)
        gathered = gather_images(config, teacher, device, real, source, report)
        pool = gathered.pool
        row |= {
            "synthesis_key": gathered.key,
            "num_cached_batches": gathered.num_found,
            "synthesis_wall_s": gathered.wall_s,
        }
        row |= image_columns(gathered, network, config, teacher, device)

        def rung(name: str, net: nn.Module) -> None:
            report("evaluating", 0, 1, {})
            if name == "teacher" and teacher_accuracy is not None:
                row["teacher_accuracy"] = teacher_accuracy
            elif test is not None:
                row[f"{name}_accuracy"] = evaluation.accuracy(net, test, space, device, kd.precision)
            if name in ("pruned", "bn_reestimated"):
                row[f"{name}_agreement"] = reference.compare(net, space, device, kd.precision)[0]

        row["num_test_images"] = None if test is None else sum(len(batch.labels) for batch in test)
        rung("teacher", network)
        rung("pruned", student)
        if batchnorm.layers(student):
            reestimate(student, config, pool, teacher, device)
            rung("bn_reestimated", student)
        else:  # no such rung: a copy of `pruned` would tell of a step that there was not
            row |= {"bn_reestimated_accuracy": None, "bn_reestimated_agreement": None}

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
            checkpoint=checkpoint,
            progress=progress,
            on_look=None if on_look is None else lambda state: on_look(row, state),
            on_epochs=on_epochs,
        )
        row["distillation_wall_s"] = time.perf_counter() - distillation_start
        rung("recovered", student)

    row |= {
        "agreement": state.best_agreement,
        "reference_kl": state.best_kl,
        "best_step": state.best_step,
        "status": "finished",
    }
    student = devices.place(student, torch.device("cpu"), channels_last=False)
    pruned = tuple(pruning.prunable(student)) if config.pruning.sparsity > 0 else ()
    row |= size_columns(student, pruned)
    info = student_info(config, teacher, row)
    images = Batch(0, pool.images, pool.labels, gathered.key)
    rows = (*held_out.rows, *gathered.rows)
    return Outcome(row, student.requires_grad_(False), info, pruned, (images,), tuple(state.epochs), rows)


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


def made_here(cache_root: Any | None) -> Images:
    """Images made by this process, through the cache in `cache_root` (a folder or URI) unless that is None."""

    def images(
        teacher: Teacher, settings: Any, domain: str, indices: Sequence[int], device: torch.device, on_batch: OnBatch
    ) -> str:
        key, make = synthesis.source(teacher, settings, device, domain)
        folder = None
        if cache_root is not None:
            folder = cache.folder_of(cache_root, key, devices.numerics_class(device))
            cache.write_manifest(
                folder,
                key=key,
                numerics=devices.numerics_class(device),
                teacher_hash=teacher.hash,
                teacher=teacher.name,
                domain=domain,
                config=settings.model_dump(mode="json"),
            )
        cache.fetch(indices, key, make, folder, on_batch)
        return key

    return images


@dataclass
class Gathered:
    """The first `num_batches` batches of a key, in one array each for images and labels."""

    num_batches: int
    settings: Any
    domain: str
    key: str = ""
    pool: Pool = field(default_factory=lambda: Pool(np.empty(0), np.empty(0)))
    rows: list[dict[str, Any]] = field(default_factory=list)
    num_found: int = 0

    def add(self, batch: Batch, found: bool) -> None:
        """Copy a batch to its place: what is shared between trials is not held while this one trains."""
        size, full_size = len(batch.labels), self.settings.batch_size
        if not self.rows:
            shape = (self.num_batches * full_size, *batch.images.shape[1:])
            self.pool = Pool(np.empty(shape, batch.images.dtype), np.empty(shape[0], np.int64))
        place = slice(batch.index * full_size, batch.index * full_size + size)
        self.pool.images[place], self.pool.labels[place] = batch.images, batch.labels
        terms = {**batch.terms, "class_histogram": json.dumps(batch.terms.get("class_histogram"))}
        what = {"domain": self.domain, "method": self.settings.method, "batch_index": batch.index, "num_images": size}
        what |= {"synthesis_version": versions()["synthesis_version"], "images_sha256": batch_sha256(batch)}
        self.rows.append({**terms, "synthesis_key": batch.key, **what})
        self.num_found += found

    @property
    def wall_s(self) -> float:
        """Seconds of making these batches, whoever made them and whenever."""
        return sum(float(row.get("wall_s", 0.0)) for row in self.rows)


def batch_sha256(batch: Batch) -> str:
    """SHA-256 of a batch's images as stored."""
    return hashlib.sha256(np.ascontiguousarray(batch.images).data.cast("B")).hexdigest()


def gather(
    config: Any,
    teacher: Teacher,
    num_images: int,
    device: torch.device,
    domain: str,
    source: Images,
    stage: str,
    report: Progress,
) -> Gathered:
    """Whole batches for at least `num_images` images, with progress."""
    gathered = Gathered(-(-num_images // config.batch_size), config, domain)

    def on_batch(batch: Batch, found: bool) -> None:
        gathered.add(batch, found)
        shown = {name: value for name, value in batch.terms.items() if isinstance(value, float)}
        report(stage, len(gathered.rows), gathered.num_batches, {**shown, "cached": gathered.num_found})

    report(stage, 0, gathered.num_batches, {})
    gathered.key = source(teacher, config, domain, range(gathered.num_batches), device, on_batch)
    total = sum(row["num_images"] for row in gathered.rows)  # the last batch of real images may be smaller
    gathered.pool = Pool(gathered.pool.images[:total], gathered.pool.labels[:total])
    for row in gathered.rows:
        row["teacher_hash"] = teacher.hash
    gathered.rows.sort(key=lambda row: row["batch_index"])
    return gathered


def gather_reference(
    config: TrialConfig, teacher: Teacher, device: torch.device, source: Images, report: Progress
) -> Gathered:
    """The held-out reference images: of the reference config, in a seed domain that no training image comes from."""
    settings, num_images = config.reference.synthesis, config.reference.num_images
    return gather(settings, teacher, num_images, device, "reference", source, "reference set", report)


def gather_images(
    config: TrialConfig,
    teacher: Teacher,
    device: torch.device,
    real: BatchSource | None,
    source: Images,
    report: Progress,
) -> Gathered:
    """The images to distil on and to re-estimate BatchNorm with."""
    settings, wanted = config.synthesis, max(config.distillation.num_images, config.bn_num_images)

    def injected(
        _teacher: Teacher, _settings: Any, _domain: str, indices: Sequence[int], _device: torch.device, add: OnBatch
    ) -> str:
        assert real is not None
        for index in indices:
            add(real(index), False)
        return real(0).key

    if settings.method == "real":
        source = injected
    return gather(settings, teacher, wanted, device, "train", source, "synthesising", report)


def image_columns(
    gathered: Gathered, network: nn.Module, config: TrialConfig, teacher: Teacher, device: torch.device
) -> dict[str, Any]:
    """What the images are: their hash, the teacher's confidence and argmax over them, their BN term."""
    pool = gathered.pool
    logits = evaluation.logits(network, pool.images, teacher.info.space, device, config.distillation.precision)
    histogram = torch.bincount(logits.argmax(dim=1), minlength=teacher.info.num_classes).tolist()
    bn = [float(row["bn"]) for row in gathered.rows if row.get("bn") is not None]
    return {
        "num_images": len(pool.labels),
        "images_sha256": hashlib.sha256(pool.images.data.cast("B")).hexdigest(),
        "image_confidence": float(logits.softmax(dim=1).amax(dim=1).mean()),
        "class_histogram": json.dumps(histogram),
        "image_bn": sum(bn) / len(bn) if bn else None,
    }


def reestimate(student: nn.Module, config: TrialConfig, pool: Pool, teacher: Teacher, device: torch.device) -> None:
    """Re-estimate the student's BatchNorm statistics on the first `bn_num_images` images, as they are."""
    size = config.synthesis.batch_size
    total = min(-(-config.bn_num_images // size) * size, len(pool.labels))

    parts = (pool.images[start : min(start + size, total)] for start in range(0, total, size))
    images = (x.contiguous(memory_format=torch.channels_last) for x in decoded(parts, teacher.info.space, device))
    with devices.autocast(config.distillation.precision, device):
        batchnorm.reestimate(student, images)


def size_columns(student: nn.Module, pruned: Sequence[str]) -> dict[str, Any]:
    """Sparsity, parameter counts and bytes of a student whose tensors named in `pruned` are stored sparse."""
    state = student.state_dict()
    return {
        "achieved_sparsity": pruning.achieved_sparsity(student),
        "num_parameters": sum(parameter.numel() for parameter in student.parameters()),
        "num_nonzero": pruning.num_nonzero(student),
        "dense_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        "stored_bytes": bundles.stored_bytes(state, pruned),
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
    return columns_of(config) | {
        "trial_id": trial_id(config, teacher),
        **versions(),
        "teacher_hash": teacher.hash,
        "teacher_architecture": teacher.info.architecture,
        "real_data": config.synthesis.method == "real",
        "package_version": dfkd_ray.__version__,
        "commit": commit.of_package(),
        "torch_version": torch.__version__,
        "ray_version": getattr(sys.modules.get("ray"), "__version__", None),
        "numerics": devices.numerics_class(devices.resolve(config.device)),
        "host": socket.gethostname(),
    }
