"""Runs one whole trial on one machine, without Ray: prune, re-estimate BatchNorm, reconstruct, distil, quantise.

The result is a row. Real data is passed in as arguments: test batches (for reporting) and, if a config asks for `real`
images, a source of them. This module opens no data set.
"""

import logging
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dfkd_ray import (
    batchnorm,
    bundles,
    devices,
    distillation,
    evaluation,
    exporting,
    ladder,
    models,
    storage,
    synthesis,
    targets,
)
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher, starts
from dfkd_ray.compression import computed_weights, pruning
from dfkd_ray.compression.channels import Prepared
from dfkd_ray.config import TrialConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import NOBODY, Observer
from dfkd_ray.heads import HEADS
from dfkd_ray.image_sources import Gathered, Images, Injected, Local, Round, wall_s
from dfkd_ray.storage import Folder, Where
from dfkd_ray.trial import quantisation, recovered, speed, starting, structure
from dfkd_ray.trial.identity import (
    CHECKPOINTS,
    TRIAL_ID,
    is_checkpoint,
    pinned,
    provenance,
    reason_of,
    remove_checkpoints,
    trial_id,
)
from dfkd_ray.trial.images import Rounds, RoundsLostError, batches_wanted, gather_reference, reference_of
from dfkd_ray.trial.recovered import Recovered
from dfkd_ray.trial.row import made_columns, student_info, test_columns
from dfkd_ray.trial.rungs import Rungs, before_training

__all__ = [
    "CHECKPOINTS",
    "INT8_FILE",
    "NOBODY",
    "TRIAL_ID",
    "Gathered",
    "Images",
    "Inputs",
    "Local",
    "Observer",
    "Outcome",
    "Round",
    "batches_wanted",
    "check",
    "on_device",
    "pinned",
    "provenance",
    "reason_of",
    "remove_checkpoints",
    "run",
    "starting_student",
    "trial_id",
]

log = logging.getLogger(__name__)
INT8_FILE = "int8.onnx"  # in a student's bundle


@dataclass(frozen=True)
class Inputs:
    """The inputs of a trial other than config and teacher.

    `test` is used for reporting only. `real` is used only if the config's method is `real`. `images` makes the
    synthetic images (default: in this process, without a cache). `teacher_accuracy`: an earlier measurement on the same
    test batches in the same precision. `trust_code`: modules and packages that may be imported for a student.
    """

    test: Sequence[Batch] | None = None
    real: BatchSource | None = None
    images: Images = field(default_factory=Local)
    teacher_accuracy: float | None = None
    trust_code: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """The results of a trial: its row, the student (None if it failed), its images, and rows of the other tables.

    `int8`: the student's ONNX file with int8 weights and activations, None without. `earlier_s`: seconds that earlier
    attempts distilled.
    """

    row: dict[str, Any]
    student: nn.Module | None = None
    student_info: bundles.BundleInfo | None = None
    pruned: tuple[str, ...] = ()
    batches: tuple[Batch, ...] = ()
    epochs: tuple[dict[str, float | int | None], ...] = ()
    synthesis: tuple[dict[str, Any], ...] = ()
    int8: bytes | None = None
    earlier_s: float = 0.0

    def save_student(self, folder: Where) -> bundles.BundleInfo:
        """Write the student as a bundle, into a folder or under a URI; with int8 also its ONNX file, beside."""
        assert self.student is not None and self.student_info is not None
        place = targets.check(folder, bundles.BUNDLE)
        if exporting.is_own_onnx(targets.head(place, INT8_FILE) or b""):
            place.remove(INT8_FILE)  # it is of the student that was there before
        info = bundles.save(place, self.student_info, self.student.state_dict(), self.pruned)
        if self.int8 is not None:
            targets.check_file(place, INT8_FILE, exporting.is_own_onnx, "an ONNX file")
            place.write(INT8_FILE, self.int8)
        return info


NOTHING = Inputs()


def run(
    config: TrialConfig,
    teacher: Teacher,
    inputs: Inputs = NOTHING,
    *,
    checkpoint: Where | None = None,
    observer: Observer = NOBODY,
) -> Outcome:
    """Run a trial. If the loss is not finite or memory runs out, the row has status `failed` and the reason.

    `checkpoint` is the folder or URI of all trials' checkpoints. The observer's `epochs` receives the evaluations on
    the reference set before each checkpoint is written. `ValueError` for a config that does not fit the teacher.
    """
    removable = check(config, teacher, inputs.trust_code)
    info = teacher.info
    evaluation.check_test(inputs.test or (), info.image_shape, info.num_classes, HEADS[info.head])
    config = pinned(config, teacher)
    if config.synthesis.method == "real" and inputs.real is None:
        raise ValueError(
            "synthesis.method=real needs real images, which this project never opens by itself: "
            "hand them in as `real_data`"
        )
    start = time.perf_counter()
    row = provenance(config, teacher)
    folder = storage.folder(checkpoint) / row["trial_id"] if checkpoint else None
    observer = replace(observer, row=row)
    try:
        try:
            outcome = steps(config, teacher, removable, row, inputs, folder, observer)
        except RoundsLostError as error:
            assert folder is not None
            log.warning("trial %s starts anew: %s", row["trial_id"], error)
            folder.clear(is_checkpoint)
            outcome = steps(config, teacher, removable, row, inputs, folder, observer)
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        log.warning("trial %s failed: %s", row["trial_id"], error)
        outcome = Outcome({**row, "status": "failed", "reason": reason_of(error)})
    finally:
        inputs.images.close(row["trial_id"])
    outcome.row["wall_s"] = outcome.earlier_s + time.perf_counter() - start
    return outcome


def check(config: TrialConfig, teacher: Teacher, trust_code: Sequence[str], on_gpu: bool = False) -> Prepared | None:
    """Check a config against the teacher before anything is computed: `ValueError` with the reason.

    Returns what structured pruning can remove of the student; None without it.

    `on_gpu`: check for a machine with a GPU, even if this one has none.
    """
    device = torch.device("cuda") if on_gpu and config.device != "cpu" else devices.resolve(config.device)
    for settings in (config.synthesis, config.reference.synthesis, config.distillation):
        devices.check_precision(getattr(settings, "precision", "float32"), device, getattr(settings, "fast", False))
    for name, settings in (("synthesis", config.synthesis), ("reference.synthesis", config.reference.synthesis)):
        synthesis.check(teacher, settings, name)
    student = teacher.network
    config = config.model_copy(update={"student": starts.pinned(config.student, teacher)})
    config.refuse_unpaired()
    if config.student.architecture is not None or config.student.weights is not None:
        student = starting_student(config, teacher, torch.device("cpu"), trust_code)
        starting.check(student, config, teacher)
    removable = structure.prepared(student, config, teacher)
    if config.pruning.sparsity > 0 or config.student.weights is not None:
        device = next(student.parameters()).device
        computed_weights.refuse(student, torch.zeros(1, *teacher.info.image_shape, device=device))
    speed.check(config.latency)
    quantisation.check(config, teacher, student)
    if config.distillation.bn_mode not in ("auto", "trained") and not batchnorm.layers(student):
        raise ValueError(
            f"distillation.bn_mode={config.distillation.bn_mode} acts on BatchNorm, and the student has none; "
            "set distillation.bn_mode=trained"
        )
    return removable


def steps(
    config: TrialConfig,
    teacher: Teacher,
    removable: Prepared | None,
    row: dict[str, Any],
    inputs: Inputs,
    checkpoint: Folder | None,
    observer: Observer,
) -> Outcome:
    """The stages of a trial, in order."""
    device, kd = devices.resolve(config.device), config.distillation
    runtime = Runtime(device, teacher.info.space, kd.precision, kd.num_threads, kd.fast)
    network, head = on_device(teacher.network, device), HEADS[teacher.info.head]
    report = observer.progress or (lambda _stage, _done, _total, _shown: None)

    with runtime.numerics():
        student = starting_student(config, teacher, device, inputs.trust_code)
        num_before = pruning.num_parameters(student)
        held_out = gather_reference(config, teacher, device, inputs.images, report)
        row["reference_wall_s"] = wall_s(held_out.rows)
        reference = reference_of(config, network, held_out.pool.images, runtime, head)

        first = Round(teacher, config.synthesis, device, student=config.student.structure)
        source = Injected(inputs.real) if inputs.real and config.synthesis.method == "real" else inputs.images
        reestimates = bool(batchnorm.layers(student))
        rounds = Rounds(config, first, source, checkpoint, report, row["trial_id"], reestimates)
        first_pool, pool = rounds.first_pool(), rounds.pool()
        row |= made_columns(rounds, pool, network, head, runtime) | test_columns(inputs.test)

        rungs = Rungs(row, reference, inputs.test, inputs.teacher_accuracy, report)
        start = before_training(student, network, config, removable, first_pool, rungs, teacher.info, checkpoint)
        if rungs.is_enough(config):
            kd = kd.model_copy(update={"num_steps": 0})
        state = distillation.distil(
            student := start.student,
            network,
            rounds.pool_at,
            kd,
            pruning.Pruned(config.pruning, start.masks, start.kept, config.student.is_new),
            reference,
            checkpoint=checkpoint,
            observer=observer,
        )
        row["distillation_wall_s"] = state.seconds
        rungs.measured[ladder.RECOVERED] = (state.best_kl, state.best_agreement)
        is_trained = config.student.is_new and state.step > 0
        # The first of equals: distillation. Random weights are no result, though they may be nearer.
        selected = ladder.RECOVERED if is_trained else rungs.nearest(ladder.RECOVERED, *rungs.measured)
        if selected is not ladder.RECOVERED:
            student.load_state_dict(rungs.states[selected])
            student.eval()
        rungs.measure(ladder.RECOVERED, student)
        if rounds.num_rounds > 1:
            pool = rounds.pool()
            row |= made_columns(rounds, pool, network, head, runtime)

    student = devices.place(student, torch.device("cpu"), channels_last=False)
    own = Recovered(student, num_before, start, selected, state, rounds, pool)
    row |= recovered.columns(config, teacher, own, rungs)
    missing = config.pruning.sparsity - row["achieved_sparsity"]
    if config.pruning.structure == "unstructured" and missing * num_prunable(own.student) >= 1:
        reason = (
            f"sparsity {row['achieved_sparsity']:.4f} instead of pruning.sparsity={config.pruning.sparsity}: "
            "pruned weights do not stay zero in this network"
        )
        return Outcome({**row, "status": "failed", "reason": reason}, earlier_s=state.earlier_s)
    return measured_for_use(config, teacher, network, own, rungs, held_out.rows)


def measured_for_use(
    config: TrialConfig,
    teacher: Teacher,
    network: nn.Module,
    own: Recovered,
    rungs: Rungs,
    reference_rows: Sequence[dict[str, Any]],
) -> Outcome:
    """The trial's outcome: a recovered student, in int8 too where the config wants that, and its latency in the row.

    `network` is the teacher's on the trial's device; `reference_rows` say how the reference set was made.
    """
    row, choice, pruned = rungs.row, own.start.choice, own.pruned(config)
    student = own.student.requires_grad_(False)
    info = student_info(config, teacher, row, () if choice is None else choice.edits)
    files = None
    if config.quantisation.int8:
        sha256 = bundles.stored_sha256(student.state_dict(), pruned)
        described = info.model_copy(update={"weights_sha256": sha256})
        to_quantise = Teacher(student, described, teacher.hash, row["trial_id"])
        files = quantisation.quantise(to_quantise, config, network, own.pool, rungs)
    else:
        rungs.leave_out(ladder.QUANTISED)
    of_another_shape = student if choice is not None or config.student.architecture is not None else None
    device = devices.resolve(config.device)
    row |= speed.columns(config.latency, network, of_another_shape, files, info.input_shape, device)
    images = Batch(0, own.pool.images, own.pool.labels, own.rounds.key)
    rows = (*reference_rows, *own.rounds.rows)
    int8, state = None if files is None else files.int8, own.state
    return Outcome(row, student, info, pruned, (images,), tuple(state.epochs), rows, int8, state.earlier_s)


def num_prunable(student: nn.Module) -> int:
    """Weights of all prunable layers."""
    return sum(weight.numel() for weight in pruning.prunable(student).values())


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy on the device, channels last; the given network is not modified."""
    return devices.place(bundles.freeze(deepcopy(network)), device)


def starting_student(
    config: TrialConfig, teacher: Teacher, device: torch.device, trust_code: Sequence[str]
) -> nn.Module:
    """A copy of the teacher, or a new network with initial weights from `distillation.seed`; or one from a file."""
    if config.student.architecture is None and config.student.weights is None:
        return on_device(teacher.network, device).requires_grad_(True)
    architecture = config.student.architecture
    module = None if architecture is None else models.untrusted_module(architecture, trust_code)
    if module is not None:
        raise ValueError(
            f"student.architecture={architecture!r} is code; if you trust that module, add `trust_code={module}`"
        )
    if architecture is None or config.student.weights is not None:
        return on_device(starts.network_of(config.student, teacher)[0], device).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.distillation.seed)
        network = models.build(
            architecture,
            config.student.arguments,
            num_classes=teacher.info.num_classes,
            image_shape=teacher.info.input_shape,
        )
    return on_device(network, device).requires_grad_(True)
