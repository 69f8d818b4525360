"""Fast: a generator of which every batch adapts a copy in a few steps, and which learns to be adapted.

A batch copies the generator θ of its round, draws inputs z ~ N(0, 1), and takes `num_steps` Adam steps on the copy θ'
and z together. Its contribution is the sum over the steps of the gradients at θ' (first-order MAML). Between rounds,
Adam moves θ along minus the mean of the batches' contributions, at the rate learning_rate · num_steps. Its moments are
kept. Source: Fang et al. 2022, arXiv 2112.06253, section 3.2; Finn et al. 2017, arXiv 1703.03400, section 5.2.

The paper has one batch in a round. Here the mean over several takes its place, so that they can be made in parallel.
`reset_round` draws the first linear layer and the first BatchNorm anew, as a new generator has them, and nothing else:
Adam's moments stay.
"""

from collections.abc import Mapping
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import devices
from dfkd_ray.batches import BatchSource, RoundState, mix_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import FastConfig
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.synthesis import inner_loop
from dfkd_ray.synthesis.generator import BETAS, Arrays, Generator, adam_arrays, arrays_of, draw, new, put_adam, restored
from dfkd_ray.synthesis.inner_loop import Fixed
from dfkd_ray.synthesis.optimiser import Aim, Made, batches

CPU = torch.device("cpu")
SEEDS = 0xFA57  # separates the generator's seeds from those of other methods
GRADIENT = "gradient."
check = inner_loop.check


def source(
    teacher: Teacher,
    config: FastConfig,
    key: str,
    device: torch.device,
    state: RoundState,
    student: nn.Module | None,
) -> BatchSource:
    """The batches of a round. `ValueError` for a teacher without BatchNorm statistics if they are to be matched."""
    against = inner_loop.fixed(teacher, config, device, state, student)
    learner = restored(teacher.info.image_shape, config, state.arrays, device)

    def make(slower: FastConfig, labels: Tensor, generator: torch.Generator, _seed: int) -> Made:
        aim, slowness = Aim(labels.to(device), SOFTMAX), slower.learning_rate / config.learning_rate
        slower = slower.model_copy(update={"input_learning_rate": slowness * config.input_learning_rate})
        images, contribution = adapt(deepcopy(learner), against, slower, aim, generator)
        return inner_loop.made(images, contribution, against, config, aim)

    return batches(teacher, config, key, device, make)


def adapt(
    learner: Generator, against: Fixed, config: FastConfig, aim: Aim, generator: torch.Generator
) -> tuple[Tensor, Arrays]:
    """The inner steps of a batch, on `learner` in place. Returns its images, and the sum of the gradients by name."""
    device = aim.labels.device
    z = torch.randn(len(aim.labels), config.num_inputs, generator=generator).to(device).requires_grad_(True)
    parameters = dict(learner.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    groups = [
        {"params": list(parameters.values())},
        {"params": [z], "lr": config.input_learning_rate},
    ]
    optimiser = devices.Adam(groups, lr=config.learning_rate, betas=BETAS)

    def add() -> None:
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            sums[name] += parameter.grad

    images, statistics = inner_loop.lowest(lambda: learner(z), optimiser, against, config, aim, generator, add)
    return images, {f"{GRADIENT}{name}": total.cpu().numpy().copy() for name, total in sums.items()} | statistics


def first_state(teacher: Teacher, config: FastConfig) -> Arrays:
    """A new generator, without moments."""
    generator = new(teacher.info.image_shape, config.num_inputs, config.num_channels, mix_seed(config.seed, SEEDS))
    return arrays_of(generator) | adam_arrays(meta_optimiser(generator, config), generator)


def advance(
    teacher: Teacher,
    config: FastConfig,
    state: RoundState,
    contributions: Mapping[str, np.ndarray],
    student: nn.Module | None,
) -> Arrays:
    """One Adam step of the generator along minus the mean contribution, and the next BatchNorm averages."""
    learner = restored(teacher.info.image_shape, config, state.arrays, CPU)
    optimiser = meta_optimiser(learner, config)
    put_adam(optimiser, learner, state.arrays)
    count = float(contributions["batches"])
    for name, parameter in learner.named_parameters():
        gradient = torch.from_numpy(np.array(contributions[f"{GRADIENT}{name}"])) / count
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    with devices.numerics("float32", CPU, config.num_threads):
        optimiser.step()
    if config.reset_round and state.number + 1 == config.reset_round:
        generator = torch.Generator().manual_seed(mix_seed(config.seed, SEEDS, config.reset_round))
        draw(learner.linear, generator)
        draw(learner.first, generator)
    carried = arrays_of(learner) | adam_arrays(optimiser, learner)
    return carried | inner_loop.next_averages(state, contributions, config.bn_momentum)


def meta_optimiser(generator: Generator, config: FastConfig) -> torch.optim.Adam:
    """The Adam between rounds."""
    return devices.Adam(generator.parameters(), lr=config.learning_rate * config.num_steps, betas=BETAS)
