"""Shared by the methods whose batches go on training the generator of their round: steps, terms, averages, refusals.

Each step makes the images anew, shifts and mirrors them, and minimises

    label_weight · label + bn_weight · bn + adversarial_weight · adversarial

`label` is the cross-entropy to the given classes and `adversarial` is `losses.decision_adversary`. Round 0 has no
student and no such term: it is the warm-up. `bn` sums `losses.batchnorm_distance` over the layers. From round 1 on it
compares the moving averages of the rounds' statistics, in which the batch has the share 1 - bn_momentum: a batch need
not match the teacher's statistics alone. Batches of a round all use the averages before it. Source: Fang et al. 2022,
arXiv 2112.06253, section 3.3.

The images of the step with the lowest loss are kept. Measured is the BatchNorm distance of the stored images alone, as
of other methods.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, losses
from dfkd_ray.batches import RoundState
from dfkd_ray.bundles import Teacher, freeze
from dfkd_ray.images import PixelSpace, flip_images, shift_images
from dfkd_ray.synthesis.generator import Arrays, finite, pixels
from dfkd_ray.synthesis.optimiser import (
    Aim,
    Made,
    bn_term,
    looked_at,
    measured,
    require_classes,
    require_statistics,
    total,
)

MEAN, VARIANCE = "bn_mean.", "bn_variance."  # of a layer, by its position, in states and contributions
Averages = Sequence[tuple[Tensor, Tensor]]  # mean and variance of each BatchNorm layer's input; empty in round 0


@dataclass(frozen=True)
class Fixed:
    """What the batches of a round are held against: networks in eval mode on the device, averages of earlier rounds."""

    network: nn.Module
    student: nn.Module | None
    space: PixelSpace
    averages: Averages
    matches_bn: bool

    def recorded(self) -> AbstractContextManager[batchnorm.Statistics]:
        """The teacher's input statistics while open; none where no term needs them."""
        return batchnorm.recorded(self.network) if self.matches_bn else nullcontext(batchnorm.Statistics())


def fixed(teacher: Teacher, config: Any, device: torch.device, state: RoundState, student: nn.Module | None) -> Fixed:
    """Of one round. `ValueError` for a teacher without BatchNorm statistics if they are to be matched."""
    devices.check_precision(config.precision, device)
    network = devices.place(freeze(deepcopy(teacher.network)), device, channels_last=config.channels_last)
    if config.bn_weight:
        batchnorm.require_layers(network)
    used = student if config.adversarial_weight else None
    return Fixed(network, used, teacher.info.space, averages_of(state.arrays, device), config.bn_weight > 0)


def check(teacher: Teacher, config: Any, where: str) -> None:
    """`ValueError` for a teacher without exclusive classes, or without the statistics that the config matches."""
    require_classes(teacher, config, where)
    if config.bn_weight:
        require_statistics(teacher, config, where, "bn_weight=0")


def lowest(
    shares: Callable[[], Tensor],
    optimiser: torch.optim.Optimizer,
    against: Fixed,
    config: Any,
    aim: Aim,
    generator: torch.Generator,
    note: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Arrays]:
    """`config.num_steps` steps on the images `pixels(shares())`; `note` is called between gradients and each step.

    Returns the images of the lowest loss, normalised, and the BatchNorm statistics of the last step as a contribution.
    `FloatingPointError` when the loss is not finite.
    """
    kept, best = None, torch.full((), torch.inf, device=aim.labels.device)
    with against.recorded() as statistics:
        for step in range(config.num_steps):
            statistics.clear()
            with devices.autocast(config.precision, aim.labels.device):
                made = shares()
            images = pixels(made, against.space)
            seen = augmented(images, config, against.space, generator)
            logits = logits_of(config, seen, against)
            loss = total(config, terms(logits, aim, averaged(statistics, against.averages, config.bn_momentum)))
            is_lower = loss.detach() < best
            best = torch.where(is_lower, loss.detach(), best)
            kept = images.detach() if kept is None else torch.where(is_lower, images.detach(), kept)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            note()
            optimiser.step()
            looked_at(loss, step + 1, config.num_steps)
        assert kept is not None
        return kept, moments(statistics)


def augmented(images: Tensor, config: Any, space: PixelSpace, generator: torch.Generator) -> Tensor:
    """Each image shifted and mirrored by chance, as in distillation."""
    images = shift_images(images, config.shift, space.bounds(images.device)[0], generator)
    return flip_images(images, generator) if config.flip else images


def logits_of(config: Any, images: Tensor, against: Fixed) -> tuple[Tensor, Tensor | None]:
    """The teacher's logits, and the student's if one is used."""
    with devices.autocast(config.precision, images.device):
        seen = devices.laid_out(images, against.network, channels_last=config.channels_last)
        logits = against.network(seen).float()
        if against.student is None:
            return logits, None
        return logits, against.student(devices.laid_out(images, against.student)).float()


def terms(logits: tuple[Tensor, Tensor | None], aim: Aim, statistics: batchnorm.Statistics) -> dict[str, Tensor]:
    """The unweighted terms by name: of the labels, of the statistics if any were recorded, of the student if any."""
    teachers, students = logits
    found = {"label": aim.head.label_loss(teachers, aim.labels)}
    if statistics.layers:
        found["bn"] = bn_term(statistics, teachers.device)
    if students is not None:
        found["adversarial"] = losses.decision_adversary(students, teachers)
    return found


def averaged(statistics: batchnorm.Statistics, averages: Averages, momentum: float) -> batchnorm.Statistics:
    """The moving averages of a batch's statistics, which are matched; the batch's own where there are no averages."""
    if not averages:
        return statistics
    means, variances = zip(*averages, strict=True)

    def moved(ours: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
        return [losses.moving(new, old, momentum) for new, old in zip(ours, before, strict=True)]

    return batchnorm.Statistics(
        moved(statistics.means, means), moved(statistics.variances, variances), statistics.layers
    )


@torch.no_grad()
def measure(config: Any, images: Tensor, against: Fixed, aim: Aim) -> dict[str, Any]:
    """The terms of the stored images as they are; also teacher confidence, label agreement, class histogram."""
    with against.recorded() as statistics:
        logits = logits_of(config, images, against)
        return measured(terms(logits, aim, statistics), logits[0], aim)


def moments(statistics: batchnorm.Statistics) -> Arrays:
    """The statistics of a batch as arrays."""
    found = {f"{MEAN}{place}": mean for place, mean in enumerate(statistics.means)}
    found |= {f"{VARIANCE}{place}": variance for place, variance in enumerate(statistics.variances)}
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in found.items()}


def averages_of(arrays: Mapping[str, np.ndarray], device: torch.device) -> Averages:
    """The moving averages in a state."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[name])).to(device)

    count = sum(name.startswith(MEAN) for name in arrays)
    return [(tensor(f"{MEAN}{place}"), tensor(f"{VARIANCE}{place}")) for place in range(count)]


def next_averages(state: RoundState, contributions: Mapping[str, np.ndarray], momentum: float) -> Arrays:
    """The moving averages after a round: its statistic is the mean over its batches. The first round's is itself."""
    after, count = {}, float(contributions["batches"])
    for name, summed in contributions.items():
        if name.startswith((MEAN, VARIANCE)):
            mean = torch.from_numpy(np.asarray(summed / count, summed.dtype))
            old = state.arrays.get(name)
            average = None if old is None else torch.from_numpy(np.array(old))
            after[name] = losses.moving(mean, average, momentum).numpy()
    return after


def made(images: Tensor, contribution: Arrays, against: Fixed, config: Any, aim: Aim) -> Made:
    """What a batch has made in `config.num_steps` steps. `FloatingPointError` if its contribution is not finite."""
    return Made(
        images,
        config.num_steps,
        lambda stored: measure(config, stored, against, aim),
        finite(contribution),
        student_passes=int(against.student is not None),
    )
