"""Methods that train one generator from the teacher and the student: DFQ, DAFL, DFAD, ZSKT.

Published loops alternate one step of the generator with a few of the student. Here they alternate by rounds: in round r
each batch trains a copy of the generator for `num_steps` steps against the student of the round, and then images of
fresh inputs are stored. The next state is the mean of the copies and of their moments, so one batch per round is plain
sequential training, and several are local steps with averaging (`generator.mean_of`). The student then trains on the
images of all rounds so far; published loops use each image once, and forget what the generator has left.

    minimise over the generator's parameters  sum over the method's terms of weight · term

    label        cross-entropy to the teacher's own class       DAFL, equation 2; DFQ
    bn           distance from the BatchNorm statistics         DFQ, as in DeepInversion
    balance      minus the entropy of the mean prediction       DAFL, equation 4; DFQ
    activation   minus the mean |input of the last linear layer|   DAFL, equation 3
    adversarial  minus KL(teacher || student): DFQ, ZSKT; minus the mean difference of logits: DFAD

The student is in eval mode, so that images do not move its BatchNorm statistics. Round 0 has no student: a method whose
only term is the student's stores images of the untrained generator there.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, features, losses
from dfkd_ray.batches import BatchSource, RoundState
from dfkd_ray.bundles import Teacher, freeze
from dfkd_ray.heads import HEADS
from dfkd_ray.synthesis import generator as generators
from dfkd_ray.synthesis.optimiser import (
    Aim,
    Made,
    augmented,
    batches,
    bn_term,
    looked_at,
    measured,
    require_classes,
    require_statistics,
    total,
)

__all__ = ["advance", "check", "first_state", "source"]


def source(
    teacher: Teacher, config: Any, key: str, device: torch.device, state: RoundState, student: nn.Module | None
) -> BatchSource:
    """Batches of one round: each trains a copy of the round's generator, and stores images of it."""
    devices.check_precision(config.precision, device)
    network = devices.place(freeze(deepcopy(teacher.network)), device, channels_last=config.channels_last)
    own = terms_of(config, student)
    learner = generators.restored(teacher.info.image_shape, config, state.arrays, device)
    space, head = teacher.info.space, HEADS[teacher.info.head]

    def images_of(generator: nn.Module, draws: torch.Generator) -> Tensor:
        z = torch.randn(config.batch_size, config.num_inputs, generator=draws).to(device)
        return generators.pixels(generator(z), space)

    def make(slower: Any, _labels: Tensor, draws: torch.Generator, _seed: int) -> Made:
        generator = deepcopy(learner)
        optimiser = devices.Adam(generator.parameters(), lr=slower.learning_rate, betas=generators.BETAS)
        generators.put_adam(optimiser, generator, state.arrays)
        num_steps = config.num_steps if own else 0
        for step in range(num_steps):
            with devices.autocast(config.precision, device):
                images = augmented(images_of(generator, draws), config, draws)
            loss = total(config, measure_terms(network, config, images, student, own)[0])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if hasattr(config, "clip_norm"):
                torch.nn.utils.clip_grad_norm_(generator.parameters(), config.clip_norm)
            optimiser.step()
            looked_at(loss, step + 1, num_steps)
        with torch.no_grad(), devices.autocast(config.precision, device):
            images = images_of(generator, draws)
            labels = network(devices.laid_out(images, network, channels_last=config.channels_last)).float().argmax(1)
        contribution = generators.arrays_of(generator) | generators.adam_arrays(optimiser, generator)

        def measure(stored: Tensor) -> dict[str, Any]:
            with torch.no_grad():
                found, logits = measure_terms(network, config, stored, student, own)
            return measured(found, logits, Aim(labels, head))

        contribution = generators.finite(contribution)
        return Made(images, num_steps, measure, contribution, labels, student_passes=int("adversarial" in own))

    return batches(teacher, config, key, device, make)


def terms_of(config: Any, student: nn.Module | None) -> tuple[str, ...]:
    """The terms that act: those with a weight, and the student's only if there is one."""
    names = ("label", "bn", "balance", "activation", "adversarial")
    acting = [name for name in names if getattr(config, f"{name}_weight", 0)]
    return tuple(name for name in acting if name != "adversarial" or student is not None)


def measure_terms(
    network: nn.Module, config: Any, images: Tensor, student: nn.Module | None, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted terms by name, and the teacher's logits."""
    laid_out = devices.laid_out(images, network, channels_last=config.channels_last)
    recording = batchnorm.recorded(network) if "bn" in names else nullcontext()
    noting = features.last_linear_inputs(network) if "activation" in names else nullcontext([])
    with recording as statistics, noting as inputs, devices.autocast(config.precision, images.device):
        logits = network(laid_out).float()
    terms: dict[str, Tensor] = {}
    for name in names:
        match name:
            case "label":
                terms[name] = nn.functional.cross_entropy(logits, logits.argmax(dim=1))
            case "bn":
                assert statistics is not None
                terms[name] = bn_term(statistics, images.device)
            case "balance":
                terms[name] = losses.batch_balance(logits)
            case "activation":
                terms[name] = losses.activation(inputs[-1].float())
            case _:
                assert student is not None
                with devices.autocast(config.precision, images.device):
                    answers = student(devices.laid_out(images, student)).float()
                differs = losses.disagreement if config.method == "dfad" else mean_divergence
                terms[name] = -differs(answers, logits)
    return terms, logits


def mean_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over images of KL(teacher || student), in nats."""
    return losses.divergences(student, teacher).mean()


def check(teacher: Teacher, config: Any, where: str) -> None:
    """`ValueError` for a teacher that lacks what the method's terms are taken from."""
    method = f"{where}.method={config.method}"
    require_classes(teacher, config, where)
    if not terms_of(config, teacher.network):
        raise ValueError(f"{method}: all weights are 0: nothing ties the images to the teacher")
    if getattr(config, "bn_weight", 0):
        require_statistics(teacher, config, where, "method=dafl, dfad or zskt, which need none")
    if getattr(config, "activation_weight", 0) and features.last_linear(teacher.network) is None:
        raise ValueError(
            f"{method} wants the input of the teacher's last Linear layer, and it has none; "
            f"set {where}.activation_weight=0"
        )


def first_state(teacher: Teacher, config: Any) -> dict[str, np.ndarray]:
    """A new generator, drawn from the seed of the config, and an Adam without a step."""
    generator = generators.new(teacher.info.image_shape, config.num_inputs, config.num_channels, config.seed)
    optimiser = devices.Adam(generator.parameters(), lr=config.learning_rate, betas=generators.BETAS)
    return generators.arrays_of(generator) | generators.adam_arrays(optimiser, generator)


def advance(
    teacher: Teacher,
    config: Any,
    state: RoundState,
    contributions: Mapping[str, np.ndarray],
    student: nn.Module | None,
) -> dict[str, np.ndarray]:
    """The mean of the batches' generators and of their moments."""
    return generators.mean_of(contributions, state.arrays)
