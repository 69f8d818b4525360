"""The rungs of a trial: how a student is measured on them, and those before training.

Before training are the pruned student, the same with BatchNorm re-estimated, and the same with its layers
reconstructed. Distillation begins with the one nearest to the teacher.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, evaluation, ladder
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import BundleInfo
from dfkd_ray.compression import channels, pruning
from dfkd_ray.compression.channels import Choice, Prepared
from dfkd_ray.config import TrialConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool, Progress
from dfkd_ray.evaluation import Reference
from dfkd_ray.images import decoded
from dfkd_ray.ladder import Rung
from dfkd_ray.storage import Folder
from dfkd_ray.trial import reconstruction, starting, structure
from dfkd_ray.trial.images import reference_of

# A fit to images is trusted if its KL divergence on the reference set is at most so many times that on these images. On
# images of DeepInversion it is 0.8 to 1.2 times (bundled ResNet-8 and ResNet-20 at 0.5 to 0.95), on random shapes 1.2
# to 6, on noise 47 to 170. The criterion's weights were nearer to the teacher on noise only, from 58 times up.
MOST_TIMES_FARTHER = 4.0


@dataclass
class Rungs:
    """Measures networks into the columns of a row, and keeps what was measured before training.

    `measured`: rung → (KL divergence, agreement) on the reference set; `states`: rung → the student's state there.
    `teacher_accuracy`: an earlier measurement, or None.
    """

    row: dict[str, Any]
    reference: Reference
    test: Sequence[Batch] | None
    teacher_accuracy: float | None
    report: Progress
    measured: dict[Rung, tuple[float, float]] = field(default_factory=dict)
    states: dict[Rung, dict[str, Tensor]] = field(default_factory=dict)

    def measure(self, rung: Rung, network: nn.Module) -> None:
        """Measure a network on a rung."""
        self.report("evaluating", 0, 1, {})
        if rung is ladder.TEACHER and self.teacher_accuracy is not None:
            self.row[rung.accuracy] = self.teacher_accuracy
        elif self.test is not None:
            runtime, head = self.reference.runtime, self.reference.head
            self.row[rung.accuracy] = evaluation.accuracy(network, self.test, runtime, head)
        if rung in ladder.BEFORE:
            agreement, kl = self.reference.compare(network)
            self.row[str(rung.agreement)], self.measured[rung] = agreement, (kl, agreement)
            self.states[rung] = deepcopy(network.state_dict())

    def leave_out(self, rung: Rung) -> None:
        """A rung that does not exist is null: the numbers of the one before would suggest that it does."""
        self.row.update({rung.accuracy: None, str(rung.agreement): None})

    def nearest(self, *candidates: Rung) -> Rung:
        """The rung nearest to the teacher, the first of equals; of all measured ones without candidates."""
        return min(candidates or self.measured, key=lambda rung: self.measured[rung][0])

    def is_enough(self, config: TrialConfig) -> bool:
        """Whether the nearest student so far is so near to the teacher that its repair ends there."""
        if config.student.is_new or config.pruning.schedule != "one_shot":  # it is no student yet
            return False
        return ladder.is_enough(self.measured[self.nearest()][0], config.enough_kl)


@dataclass(frozen=True)
class Start:
    """What distillation begins with: a student, its masks, the rung that it is from.

    `choice`: the channels that were removed of it; None without structured pruning.
    """

    student: nn.Module
    masks: pruning.Masks
    rung: Rung
    choice: Choice | None = None
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The output channels that stay, of each layer that has lost some."""
        edits = () if self.choice is None else self.choice.edits
        return {edit.module: tuple(edit.kept) for edit in edits if edit.dimension == "out"}


def before_training(
    student: nn.Module,
    teacher: nn.Module,
    config: TrialConfig,
    removable: Prepared | None,
    pool: Pool,
    rungs: Rungs,
    info: BundleInfo,
    checkpoint: Folder | None,
) -> Start:
    """Prune a dense student, re-estimate its BatchNorm, reconstruct its layers, and measure each.

    `pool`: the images of round 0. `removable`: what structured pruning can remove, None without it. `info`: of the
    teacher. `checkpoint`: the trial's folder; None without one.
    """
    runtime, choice = rungs.reference.runtime, None
    if removable is not None:
        choice = structure.chosen(student, removable, config, info, pool, runtime, checkpoint)
        masks, warned = choice.masks, list(choice.warnings)
    else:
        masks, warned = reconstruction.masks(student, config, pool, runtime)
    zeros = starting.zeros(student, config)
    masks = starting.both(masks, zeros)
    rungs.row |= starting.columns(config, zeros)
    dense = deepcopy(student)
    pruning.apply(student, masks)
    rungs.measure(ladder.TEACHER, teacher)
    rungs.measure(ladder.PRUNED, student)
    start = ladder.PRUNED
    if batchnorm.layers(student):
        reestimate(student, config, pool, runtime)
        rungs.measure(ladder.BN_REESTIMATED, student)
        start = ladder.BN_REESTIMATED
    else:
        rungs.leave_out(ladder.BN_REESTIMATED)
    if reconstruction.applies(config, masks) and not rungs.is_enough(config):
        start, masks, said = reconstructed(student, teacher, config, pool, rungs, masks, start)
        warned += said
    else:
        rungs.leave_out(ladder.RECONSTRUCTED)

    # Frozen BatchNorm keeps the teacher's statistics. The cubic schedule starts dense and makes its own masks.
    if config.pruning.schedule == "cubic":
        student = dense
        masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    elif config.distillation.bn_mode == "frozen":
        pruning.apply(dense, masks)
        student, start = dense, ladder.PRUNED
    if choice is not None:  # the channels that were masked go
        images = reconstruction.fitting_images(student, config, pool, runtime)(channels.NUM_TRIED)
        student, rungs.states = structure.small(student, rungs.states, choice, images)
        masks = {}
    return Start(student, masks, start, choice, tuple(warned))


def reconstructed(
    student: nn.Module,
    teacher: nn.Module,
    config: TrialConfig,
    pool: Pool,
    rungs: Rungs,
    masks: pruning.Masks,
    before: Rung,
) -> tuple[Rung, pruning.Masks, list[str]]:
    """Reconstruct the layers of a pruned student, and leave it on the nearer of this rung and the one before.

    Returns that rung, the masks that the student has there, and warnings.
    """
    rungs.report("reconstructing", 0, 1, {})
    start = time.perf_counter()
    found, warned = nearest_fit(student, teacher, config, pool, rungs, masks)
    if found is not None:
        rungs.row["reconstruction_wall_s"] = time.perf_counter() - start
        rungs.measure(ladder.RECONSTRUCTED, student)
        before = rungs.nearest(ladder.RECONSTRUCTED, before)
    else:
        rungs.leave_out(ladder.RECONSTRUCTED)
    student.load_state_dict(rungs.states[before])
    return before, found if found is not None and before is ladder.RECONSTRUCTED else masks, warned


def nearest_fit(
    student: nn.Module, teacher: nn.Module, config: TrialConfig, pool: Pool, rungs: Rungs, masks: pruning.Masks
) -> tuple[pruning.Masks | None, list[str]]:
    """Reconstruct a student in place with weights chosen anew; if in doubt also with the criterion's: the nearer stays.

    On images that are far from the teacher's data, such as noise, the criterion's weights are the better ones. There
    the fit is far nearer to the teacher on its own images than on the reference set; only then both fits are made. With
    `enough_kl`, the criterion's weights come first, and others are chosen where these are not near enough.
    Returns the student's masks, None if it cannot be reconstructed, and warnings.
    """
    fits: dict[bool, tuple[float, pruning.Masks, list[str], dict[str, Tensor]]] = {}
    warned, failed = [], []
    kinds = kinds_of_fit(config)
    for reselect in kinds:
        student.load_state_dict(rungs.states[ladder.PRUNED])
        found, warned = reconstruction.reconstruct(
            student, teacher, config, pool, rungs.reference.runtime, masks, reselect=reselect
        )
        if found is None:
            failed += warned if reselect else []
            continue
        kl = rungs.reference.compare(student)[1] if config.reselects else 0.0
        fits[reselect] = (kl, found, warned, deepcopy(student.state_dict()))
        if reselect is kinds[-1] or ladder.is_enough(kl, config.enough_kl):
            break
        if reselect and kl <= MOST_TIMES_FARTHER * kl_on(pool, student, teacher, config, rungs):
            break
    if not fits:
        return None, warned
    kl, found, warned, state = min(fits.values(), key=lambda fit: fit[0])
    if failed:
        warned = [*warned, *(f"reconstruction.reselect: the criterion's weights stay: {reason}" for reason in failed)]
    elif True in fits and kl < fits[True][0]:
        warned = [
            *warned,
            f"reconstruction.reselect: the criterion's weights stay (reference KL {kl:.3g}): those chosen anew on "
            f"these images are farther from the teacher ({fits[True][0]:.3g})",
        ]
    student.load_state_dict(state)
    return found, warned


def kinds_of_fit(config: TrialConfig) -> tuple[bool, ...]:
    """Whether weights are chosen anew, of each fit in turn: first the criterion's, the cheaper, if they may do."""
    if not config.reselects:
        return (False,)
    return (False, True) if config.enough_kl else (True, False)


def kl_on(pool: Pool, student: nn.Module, teacher: nn.Module, config: TrialConfig, rungs: Rungs) -> float:
    """The KL divergence of a student on images of a pool, mixed like the reference set."""
    own = reference_of(config, teacher, pool.images, rungs.reference.runtime, rungs.reference.head)
    return own.compare(student)[1]


def reestimate(student: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime) -> None:
    """Re-estimate the student's BatchNorm statistics on the first `bn_num_images` images, without augmentation."""
    size = config.synthesis.batch_size
    total = min(-(-config.bn_num_images // size) * size, len(pool.labels))

    parts = (pool.images[start : min(start + size, total)] for start in range(0, total, size))
    images = (devices.laid_out(x, student) for x in decoded(parts, runtime.space, runtime.device))
    with runtime.autocast():
        batchnorm.reestimate(student, images)
