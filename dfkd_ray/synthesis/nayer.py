"""NAYER: a generator of class embeddings, whose randomness is in layers and not in inputs.

An image's embedding e_y is a constant of its class. A BatchNorm scales it, a linear layer with weights W ~ N(0, 1) and
biases 0 mixes it, and the generator's body makes an image of the result. Every C consecutive images of a batch share
such a *noisy layer*, C the number of classes, so that each makes one image of every class. The generator cannot ignore
it, as it can random inputs beside an embedding. Source: Tran et al. 2024, arXiv 2310.00258, sections 3.2 and 3.3.

Each batch draws its noisy layers anew, and trains them and the generator of its round for `num_steps` Adam steps. The
generator and Adam's moments of the next round are the means over the batches. Every `generator_life` rounds a new
generator takes their place; the averages of the BatchNorm statistics stay.

The paper's embeddings are a language model's of the classes' names. Here the default is the teacher's own knowledge of
its classes: the rows of its last linear layer. `orthonormal` and `one_hot` know nothing of the classes but that they
differ. Embeddings are made once and travel in the state.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfkd_ray import devices, features
from dfkd_ray.batches import BatchSource, RoundState, mix_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import NayerConfig
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.synthesis import inner_loop
from dfkd_ray.synthesis.generator import (
    ADAM,
    BETAS,
    GENERATOR,
    Arrays,
    Generator,
    adam_arrays,
    arrays_of,
    draw,
    load,
    mean_of,
    put_adam,
)
from dfkd_ray.synthesis.optimiser import Aim, Made, batches

SEEDS, EMBEDDING_SEEDS = 0x4A7E4, 0xE3BED  # separate the seeds of generators and embeddings from others
DISTINCT = 1e-6  # the least distance of two embeddings of length 1


class Conditional(nn.Module):
    """The BatchNorm of embeddings (n, features), and the generator behind the noisy layers."""

    def __init__(self, teacher: Teacher, config: NayerConfig, num_features: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features)
        self.body = Generator(teacher.info.image_shape, config.num_inputs, config.num_channels)


class Noisy(NamedTuple):
    """The noisy layers of a batch: weights (layers, outputs, features) and biases (layers, outputs)."""

    weights: Tensor
    biases: Tensor


def source(
    teacher: Teacher,
    config: NayerConfig,
    key: str,
    device: torch.device,
    state: RoundState,
    student: nn.Module | None,
) -> BatchSource:
    """The batches of a round. `ValueError` for a teacher without BatchNorm statistics if they are to be matched."""
    against = inner_loop.fixed(teacher, config, device, state, student)
    embeddings = torch.from_numpy(np.array(state.arrays["embeddings"])).to(device)
    learner = unfilled(teacher, config, embeddings.shape[1])
    load(learner, state.arrays, device)

    def make(slower: NayerConfig, labels: Tensor, generator: torch.Generator, _seed: int) -> Made:
        aim, own = Aim(labels.to(device), SOFTMAX), deepcopy(learner)
        noisy = noisy_layers(len(labels), embeddings, config.num_inputs, generator)
        optimiser = optimiser_of(own, slower, noisy)
        put_adam(optimiser, own, state.arrays)
        given = embeddings[aim.labels]

        def shares() -> Tensor:
            return own.body(mixed(own.norm(given), noisy, len(embeddings)))

        images, statistics = inner_loop.lowest(shares, optimiser, against, slower, aim, generator)
        contribution = arrays_of(own) | adam_arrays(optimiser, own) | statistics
        return inner_loop.made(images, contribution, against, config, aim)

    return batches(teacher, config, key, device, make)


def check(teacher: Teacher, config: NayerConfig, where: str) -> None:
    """`ValueError` for a teacher that does not fit, or whose last linear layer does not tell the classes apart."""
    inner_loop.check(teacher, config, where)
    try:
        embeddings_of(teacher, config)
    except ValueError as error:
        raise ValueError(
            f"{where}.method=nayer: {where}.embedding={config.embedding} {error}; use {where}.embedding=orthonormal "
            "or one_hot"
        ) from None


def embeddings_of(teacher: Teacher, config: NayerConfig) -> Float[Tensor, "classes features"]:
    """An embedding of length 1 for each class, on the CPU. `ValueError` if the teacher has none that differ."""
    num_classes = teacher.info.num_classes
    if config.embedding == "one_hot":
        return torch.eye(num_classes)
    if config.embedding == "orthonormal":
        generator = torch.Generator().manual_seed(mix_seed(config.seed, EMBEDDING_SEEDS))
        return torch.linalg.qr(torch.randn(num_classes, num_classes, generator=generator))[0].contiguous()
    layer = features.last_linear(teacher.network)
    if layer is None:
        raise ValueError("needs a teacher with a linear layer, whose rows stand for the classes: it has none")
    weights = layer.weight.detach().float().cpu()
    if len(weights) != num_classes:
        raise ValueError(
            f"needs a last linear layer with a row for each of the {num_classes} classes: the teacher's has "
            f"{len(weights)} rows"
        )
    if not weights.isfinite().all() or not (lengths := torch.linalg.vector_norm(weights, dim=1)).all():
        raise ValueError("needs rows of the teacher's last linear layer that are finite and not 0")
    embeddings = weights / lengths[:, None]
    if (twin := equal_rows(embeddings)) is not None:
        raise ValueError(
            f"needs rows of the teacher's last linear layer in different directions: those of the classes {twin[0]} "
            f"and {twin[1]} are the same"
        )
    return embeddings


def equal_rows(rows: Float[Tensor, "n features"]) -> tuple[int, int] | None:
    """Two rows that do not differ; None if all do."""
    for place, row in enumerate(rows[1:], 1):
        same = (rows[:place] - row).abs().amax(dim=1) < DISTINCT
        if same.any():
            return int(same.int().argmax()), place
    return None


def noisy_layers(num_images: int, embeddings: Tensor, num_outputs: int, generator: torch.Generator) -> Noisy:
    """The noisy layers of a batch: W ~ N(0, 1), one for every C images; the last may be for fewer."""
    num_classes, num_features = embeddings.shape
    count = -(-num_images // num_classes)
    weights = torch.randn(count, num_outputs, num_features, generator=generator).to(embeddings.device)
    biases = torch.zeros(count, num_outputs, device=embeddings.device)
    return Noisy(weights.requires_grad_(True), biases.requires_grad_(True))


def mixed(given: Float[Tensor, "n features"], noisy: Noisy, num_classes: int) -> Float[Tensor, "n outputs"]:
    """W_j h_i + b_j for each image i, with the noisy layer j = floor(i / C)."""
    group = min(num_classes, len(given))
    filled = F.pad(given, (0, 0, 0, len(noisy.weights) * group - len(given)))
    grouped = filled.view(len(noisy.weights), group, -1)
    return torch.baddbmm(noisy.biases[:, None], grouped, noisy.weights.transpose(1, 2)).flatten(0, 1)[: len(given)]


def first_state(teacher: Teacher, config: NayerConfig) -> Arrays:
    """The embeddings, and a new generator without moments."""
    embeddings = embeddings_of(teacher, config)
    return {"embeddings": embeddings.numpy().copy()} | fresh(teacher, config, embeddings.shape[1], 0)


def fresh(teacher: Teacher, config: NayerConfig, num_features: int, number: int) -> Arrays:
    """A new generator of round `number`, without moments."""
    learner = unfilled(teacher, config, num_features)
    draw(learner, torch.Generator().manual_seed(mix_seed(config.seed, SEEDS, number)))
    return arrays_of(learner) | adam_arrays(optimiser_of(learner, config), learner)


def advance(
    teacher: Teacher,
    config: NayerConfig,
    state: RoundState,
    contributions: Mapping[str, np.ndarray],
    student: nn.Module | None,
) -> Arrays:
    """The mean generator of the round, or a new one at the end of its life, and the next BatchNorm averages."""
    embeddings, number = state.arrays["embeddings"], state.number + 1
    if config.generator_life and number % config.generator_life == 0:
        after = fresh(teacher, config, embeddings.shape[1], number)
    else:
        carried = {name: array for name, array in state.arrays.items() if name.startswith((GENERATOR, ADAM))}
        after = mean_of(contributions, carried)
    averages = inner_loop.next_averages(state, contributions, config.bn_momentum)
    return {"embeddings": embeddings} | after | averages


def unfilled(teacher: Teacher, config: NayerConfig, num_features: int) -> Conditional:
    """The module in train mode on the CPU, for parameters to be put into; PyTorch's generator does not move."""
    with torch.random.fork_rng(devices=[]):
        return Conditional(teacher, config, num_features).train()


def optimiser_of(learner: Conditional, config: NayerConfig, noisy: Noisy | None = None) -> torch.optim.Adam:
    """Adam over the generator and a batch's noisy layers."""
    return devices.Adam([*learner.parameters(), *(noisy or ())], lr=config.learning_rate, betas=BETAS)
