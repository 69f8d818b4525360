"""Contrastive model inversion (CMI): each image is told apart from all that were made before it.

minimise  bn_weight · bn + label_weight · label + adversarial_weight · adversarial + contrastive_weight · contrastive
over a generator that is new in each batch, and over its inputs. All but the last are of the *global* view of the
images, shifted and flipped. The last compares it with the *local* view, a resized crop: a projection head maps the
teacher's features of a view to a point, and the point of an image's local view is to be nearest to that of its own
global view, among those of the batch and of images drawn from a memory bank. Source: Fang et al. 2021, arXiv
2105.08584. The features are channel means of the inputs of the teacher's BatchNorm layers.

The state has the projection head with its Adam, and the bank: the features of the newest `bank_size` images, both
views. Batches of a round begin with the same head, train it each on their own, and are averaged. They do not see each
other's images: the bank has those of earlier rounds.

The images of the step with the lowest loss are kept, without shift or flip. The paper's head has a hidden layer as wide
as the features. Here it has `num_projected` channels, because the head travels with each batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, losses, untrusted
from dfkd_ray.batches import Batch, BatchSource, RoundState
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import CmiConfig
from dfkd_ray.heads import HEADS
from dfkd_ray.images import crop_images, flip_images
from dfkd_ray.synthesis import inner_loop
from dfkd_ray.synthesis.generator import (
    BETAS,
    Arrays,
    adam_arrays,
    arrays_of,
    draw,
    finite,
    load,
    mean_of,
    new,
    pixels,
    put_adam,
)
from dfkd_ray.synthesis.inner_loop import Fixed
from dfkd_ray.synthesis.optimiser import (
    Aim,
    Made,
    batches,
    looked_at,
    measured,
    require_classes,
    require_statistics,
    total,
)

HEAD, ADAM, BANK, FEATURES = "head.", "head_adam.", "bank", "features"  # names of arrays, and beginnings of names
MOST_STATE = 2**30  # bytes: each batch of a round is sent the state


def source(
    teacher: Teacher,
    config: CmiConfig,
    key: str,
    device: torch.device,
    state: RoundState | None = None,
    student: nn.Module | None = None,
) -> BatchSource:
    """Batches of a round. `ValueError` for a teacher without BatchNorm statistics.

    The source uses a copy of the teacher's network on `device`; the network itself is not modified.
    """
    assert state is not None, "a method in rounds"
    against = inner_loop.fixed(teacher, config, device, state, student)
    batchnorm.require_layers(against.network)
    against = replace(against, matches_bn=True)  # measured whatever its weight, as by DeepInversion
    head, shape = HEADS[teacher.info.head], teacher.info.image_shape

    def make(slower: CmiConfig, labels: Tensor, generator: torch.Generator, _seed: int) -> Made:
        aim = Aim(labels.to(device), head)
        contrast = Contrast(slower, state.arrays, device) if config.contrastive_weight else None
        own_seed = int(torch.randint(2**62, (), generator=generator))
        maker = new(shape, config.num_inputs, config.num_channels, own_seed)
        devices.place(maker, device, channels_last=config.channels_last)
        inverter = Inverter(against, contrast, slower, aim)
        kept = invert(maker, inverter, generator)

        def measure(stored: Tensor) -> dict[str, Any]:
            terms = inverter.measure(stored)
            return terms | ({"contrastive": float(kept["contrastive"])} if contrast else {})

        contribution = contrast.contribution(kept["features"]) if contrast else {}
        seen, by_student = 2 if contrast else 1, int(against.student is not None)
        return Made(
            kept["images"], config.num_steps, measure, contribution, teacher_passes=seen, student_passes=by_student
        )

    make_batch = batches(teacher, config, key, device, make)

    def batch(index: int) -> Batch:
        made = make_batch(index)
        names = {FEATURES: f"{FEATURES}.{index}"}  # equal names would be summed
        return replace(made, contribution={names.get(name, name): one for name, one in made.contribution.items()})

    return batch


def first_state(teacher: Teacher, config: CmiConfig) -> Arrays:
    """A projection head drawn from the config's seed, and an empty bank; nothing without the contrastive loss."""
    if not config.contrastive_weight:
        return {}
    size = num_features(teacher.network, teacher.info.image_shape)
    head = projection(size, config.num_projected)
    draw(head, torch.Generator().manual_seed(config.seed))
    optimiser = devices.Adam(head.parameters(), lr=config.learning_rate, betas=BETAS)
    bank = np.zeros((0, 2, size), config.bank_type)
    return {**arrays_of(head, HEAD), **adam_arrays(optimiser, head, ADAM), BANK: bank}


def advance(
    teacher: Teacher,
    config: CmiConfig,
    state: RoundState,
    contributions: Mapping[str, np.ndarray],
    student: nn.Module | None,
) -> Arrays:
    """The mean of the batches' heads, and the bank with their images' features, in the order of the batches."""
    if not config.contrastive_weight:
        return {}
    head = {name: array for name, array in state.arrays.items() if name.startswith((HEAD, ADAM))}
    added = [name for name in contributions if name.startswith(f"{FEATURES}.")]
    added.sort(key=lambda name: int(name.removeprefix(f"{FEATURES}.")))
    bank = newest([state.arrays[BANK], *(contributions[name] for name in added)], config.bank_size)
    return {**mean_of(contributions, head), BANK: bank}


def check(teacher: Teacher, config: CmiConfig, where: str) -> None:
    """`ValueError` for a teacher that the method cannot use; `where`: the config's dotted name."""
    what, others = f"{where}.method={config.method}", "method=records, where it has some, or noise"
    require_classes(teacher, config, where)
    require_statistics(teacher, config, where, others)
    try:
        size = num_features(teacher.network, teacher.info.image_shape) if config.contrastive_weight else 0
    except ValueError as error:
        raise ValueError(f"{what}: {error}; or {where}.{others}") from None
    num_bytes = state_bytes(config, size)
    if num_bytes > MOST_STATE:
        raise ValueError(
            f"{what}: memory bank and projection head of {size:,} features take {untrusted.size(num_bytes)}, and may "
            f"take {untrusted.size(MOST_STATE)}; lower {where}.bank_size or {where}.num_projected"
        )


def state_bytes(config: CmiConfig, size: int) -> int:
    """The largest size of the state with so many features of an image."""
    width = config.num_projected
    parameters = (size + 1) * width + (width + 1) * width
    return 3 * 4 * parameters + config.bank_size * 2 * size * np.dtype(config.bank_type).itemsize


# ---- views -----------------------------------------------------------------------------------------------------------


def local_view(
    images: Float[Tensor, "n c h w"], config: CmiConfig, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """A crop of each image, of `crop_scale` to all of it, at the image's size, and flipped or not. Differentiable."""
    seen = crop_images(images, config.crop_scale, generator)
    return flip_images(seen, generator) if config.flip else seen


# ---- features --------------------------------------------------------------------------------------------------------


@contextmanager
def observed(network: nn.Module) -> Iterator[Callable[[int], Tensor]]:
    """While open, the function that is yielded gives the features of the last forward pass of n images, (n, features).

    They are float32 means over positions of each channel of the inputs of the BatchNorm layers, in the order they ran.
    It works within and without `batchnorm.recorded`, because it looks at a layer from outside. `ValueError` if a layer
    sees another number of rows than images.
    """
    seen: list[Tensor] = []

    def note(_layer: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0]
        seen.append(x.flatten(2).mean(dim=2, dtype=torch.float32) if x.ndim > 2 else x.float())

    def taken(num_images: int) -> Tensor:
        means = list(seen)
        seen.clear()
        wrong = next((len(rows) for rows in means if len(rows) != num_images), None)
        if wrong is not None:
            raise ValueError(
                f"one of its BatchNorm layers sees {wrong} rows of {num_images} images: images have no features there"
            )
        return torch.cat(means, dim=1)

    handles = [layer.register_forward_pre_hook(note) for layer in batchnorm.layers(network)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def num_features(network: nn.Module, image_shape: Sequence[int]) -> int:
    """The number of an image's features. `ValueError` if a BatchNorm layer does not see one row for each image."""
    images = torch.zeros(2, *image_shape, device=next(network.parameters()).device)
    with observed(network) as taken:
        network(devices.laid_out(images, network))
        return taken(2).shape[1]


def projection(num_inputs: int, width: int) -> nn.Module:
    """A projection head: two layers of this width, not yet drawn; PyTorch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width))


def newest(parts: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The memory bank: the last `size` rows of parts (any, *row), oldest first, in the first part's type."""
    rows = np.concatenate(parts)
    return rows[max(0, len(rows) - size) :].astype(parts[0].dtype)


def stored(features: Float[Tensor, "n views features"], kind: str) -> np.ndarray:
    """Features in the type of a bank; what a narrow type cannot hold is its largest number."""
    largest = float(np.finfo(kind).max)
    return np.clip(features.cpu().numpy(), -largest, largest).astype(kind)


class Contrast:
    """The contrastive loss in one batch: the projection head, which the batch trains, and the memory bank."""

    def __init__(self, config: CmiConfig, arrays: Mapping[str, np.ndarray], device: torch.device):
        self.config = config
        self.bank = torch.from_numpy(np.array(arrays[BANK])).to(device)
        self.head = projection(self.bank.shape[2], config.num_projected)
        load(self.head, arrays, device, HEAD)
        self.optimiser = devices.Adam(self.head.parameters(), lr=config.learning_rate, betas=BETAS)
        put_adam(self.optimiser, self.head, arrays, ADAM)

    def loss(self, features: Float[Tensor, "n views features"], generator: torch.Generator) -> Float[Tensor, ""]:
        """The loss of the images' features of (local view, global view), against rows drawn from the bank."""
        drawn = torch.randperm(len(self.bank), generator=generator)[: self.config.num_negatives]
        rows = torch.cat([features, self.bank[drawn.to(self.bank.device)].float()])
        queries = F.normalize(self.head(rows[:, 0]), dim=1)
        with torch.no_grad():
            keys = F.normalize(self.head(rows[:, 1]), dim=1)
        return losses.contrastive(queries, keys, len(features), self.config.temperature)

    def contribution(self, features: Float[Tensor, "n views features"]) -> Arrays:
        """The batch's summand of the next state: the trained head, and the features of the images."""
        head = {**arrays_of(self.head, HEAD), **adam_arrays(self.optimiser, self.head, ADAM)}
        return finite({**head, FEATURES: stored(features, self.config.bank_type)})


# ---- optimisation ----------------------------------------------------------------------------------------------------


class Inverter:
    """What one batch is held against and for, and its loss terms."""

    def __init__(self, against: Fixed, contrast: Contrast | None, config: CmiConfig, aim: Aim):
        self.against, self.contrast, self.config, self.aim = against, contrast, config, aim

    def fit(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The unweighted terms of a view, without the contrastive loss; the teacher's logits."""
        with self.against.recorded() as statistics:
            logits = inner_loop.logits_of(self.config, images, self.against)
        return inner_loop.terms(logits, self.aim, statistics), logits[0]

    def terms(
        self, images: Tensor, taken: Callable[[int], Tensor], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All unweighted terms of images by name; what else is kept of them. `taken`: see `observed`."""
        terms, _ = self.fit(inner_loop.augmented(images, self.config, self.against.space, generator))
        whole = taken(len(images))
        if self.contrast is None:
            return terms, {"images": images}
        inner_loop.logits_of(
            self.config, local_view(images, self.config, generator), replace(self.against, student=None)
        )
        features = torch.stack([taken(len(images)), whole], dim=1)
        terms["contrastive"] = self.contrast.loss(features, generator)
        return terms, {"images": images, "features": features, "contrastive": terms["contrastive"]}

    @torch.no_grad()
    def measure(self, images: Tensor) -> dict[str, Any]:
        """The terms of the stored images, without views; also confidence, label agreement, class histogram."""
        terms, logits = self.fit(images)
        return measured(terms, logits, self.aim)


def invert(maker: nn.Module, inverter: Inverter, generator: torch.Generator) -> dict[str, Tensor]:
    """Optimise a generator and its inputs: the images (normalised) of the step with the lowest loss, with its values.

    `FloatingPointError` when the loss is no longer finite.
    """
    config, contrast = inverter.config, inverter.contrast
    device = inverter.aim.labels.device
    z = torch.randn(config.batch_size, config.num_inputs, generator=generator).to(device).requires_grad_(True)
    optimisers = [devices.Adam([*maker.parameters(), z], lr=config.learning_rate, betas=BETAS)]
    optimisers += [contrast.optimiser] if contrast else []
    kept: dict[str, Tensor] = {}
    with observed(inverter.against.network) as taken:
        for step in range(config.num_steps):
            with devices.autocast(config.precision, device):
                images = pixels(maker(z), inverter.against.space)
            terms, values = inverter.terms(images, taken, generator)
            loss = total(config, terms)
            kept = lower(kept, {"loss": loss.detach()} | {name: value.detach() for name, value in values.items()})
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            looked_at(loss, step + 1, config.num_steps)
    return kept


def lower(kept: Mapping[str, Tensor], offered: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whichever has the lower `loss`, the kept one if both are equal; without synchronisation of a GPU."""
    if not kept:
        return offered
    better = offered["loss"] < kept["loss"]
    return {name: torch.where(better, value, kept[name]) for name, value in offered.items()}
