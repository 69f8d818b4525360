"""Images from activation records: noise is optimised until the teacher's activations match samples of the record.

Labels cycle over the classes. For each image a target is drawn from the record (`gaussian`: a sample of its class;
`exemplars`: one example's coefficients). Then the term `record` is minimised over the pixels, plus optional terms that
the paper does not have:

* `top`, `all`: sum over layers of mean_units (ReLU(target) - ReLU(values))². Values are a layer's outputs; for the last
  layer, logits / T.
* `spectral`, `spectral_pairs`: (1 / units) sum over signals of ||s_bar - s(x)||². s_bar is the signal with the target's
  coefficients and zeros elsewhere. It is constant, so a step needs no product with the bases. With `residual=false`
  only the kept coefficients are compared.

Source: Lopes, Fenu and Starner 2017, arXiv 1710.07535, sections 3 and 4. Defaults are the paper's (Adam, lr 0.07, 1,000
steps, start N(0.15, 0.1), no other term), except the batch size: images are independent, so it affects only speed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, losses
from dfkd_ray.batches import BatchSource, mix_seed
from dfkd_ray.bundles import Teacher, freeze
from dfkd_ray.config import RecordsConfig
from dfkd_ray.heads import SOFTMAX
from dfkd_ray.images import PixelSpace
from dfkd_ray.records import gaussian, spectral, taps
from dfkd_ray.records.format import SPECTRAL, Record
from dfkd_ray.synthesis.optimiser import (
    Aim,
    Made,
    batches,
    bn_term,
    compose,
    looked_at,
    measured,
    pyramid_sizes,
    set_learning_rate,
    total,
)


def source(teacher: Teacher, config: RecordsConfig, key: str, device: torch.device) -> BatchSource:
    """Batches of reconstructed images. `ValueError` if the record, or BatchNorm for `bn_weight`, is missing.

    The source uses a copy of the teacher's network on `device`; the network itself is not modified.
    """
    devices.check_precision(config.precision, device)
    record = teacher.record(config.record)
    record = replace(record, bases=tuple(basis.to(device) for basis in record.bases))
    network = devices.place(freeze(deepcopy(teacher.network)), device, channels_last=config.channels_last)
    if config.bn_weight:
        batchnorm.require_layers(network)
    found = taps.find(network, teacher.info.image_shape)
    space = teacher.info.space

    def make(slower: RecordsConfig, labels: Tensor, generator: torch.Generator, seed: int) -> Made:
        drawn = [target.to(device) for target in draw(record, labels, generator)]
        targets = targets_of(record, drawn, config.residual)
        parts = initial_parts(slower, teacher.info.image_shape, generator, device)
        there = labels.to(device)
        with frozen_dropout(network, config.dropout, mix_seed(seed, 0xD0)):
            images, steps = reconstruct(network, found, record, slower, space, parts, targets, there)
        return Made(images, steps, lambda stored: measure(network, found, record, config, stored, targets, there))

    return batches(teacher, config, key, device, make)


def check(teacher: Teacher, config: RecordsConfig, where: str) -> None:
    """`ValueError` for independent labels (records are per class), and for `bn_weight` and a teacher without BatchNorm.

    `where` is the dotted name of the config.
    """
    if teacher.info.head != SOFTMAX.name:
        raise ValueError(
            f"{where}.method={config.method}: records are per class, and this teacher has independent labels (head "
            f"{teacher.info.head}); set {where}.method=deepinversion"
        )
    if config.bn_weight:
        try:
            batchnorm.check_recording(teacher.network, teacher.info.image_shape)
        except ValueError as error:
            raise ValueError(f"{where}.bn_weight={config.bn_weight:g}: {error}; set it to 0") from None


def pin(teacher: Teacher, config: RecordsConfig) -> RecordsConfig:
    """The config with the SHA-256 of its record's file. `ValueError` if the config already has another hash."""
    sha256 = teacher.record(config.record).sha256
    if config.record_sha256 not in (None, sha256):
        raise ValueError(
            f"record_sha256 is {config.record_sha256[:12]}…, the {config.record} record of {teacher.name} has "
            f"{sha256[:12]}…: it is another one"
        )
    return config.model_copy(update={"record_sha256": sha256})


def draw(record: Record, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """A target per image and part: (images, units) each; for spectral records one part, (images, coefficients)."""
    info, tensors = record.info, record.tensors
    if info.storage == "exemplars":
        return [exemplar_coefficients(record, labels, generator)]
    targets = []
    for part in info.parts:
        means, factors = tensors[f"{part.name}.mean"], tensors[f"{part.name}.factor"]
        target = torch.empty(len(labels), part.units)
        for label in labels.unique().tolist():
            chosen = labels == label
            target[chosen] = gaussian.sample(means[label], factors[label].float(), int(chosen.sum()), generator)
        targets.append(target)
    return targets


def targets_of(record: Record, drawn: Sequence[Tensor], residual: bool) -> list[Tensor]:
    """The targets compared at every step: the draws or, for spectral records, the signals with these coefficients."""
    if record.info.kind not in SPECTRAL or not residual:
        return list(drawn)
    parts = drawn[0].split([basis.shape[1] for basis in record.bases], dim=1)
    return [spectral.signal_of(part, basis) for part, basis in zip(parts, record.bases, strict=True)]


def exemplar_coefficients(record: Record, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The kept coefficients of a random exemplar of each label, zero elsewhere."""
    tensors = record.tensors
    columns = sum(basis.columns for basis in record.info.bases)
    target = torch.zeros(len(labels), columns)
    for position, label in enumerate(labels.tolist()):
        own = (tensors["labels"] == label).nonzero().flatten()
        chosen = own[torch.randint(len(own), (), generator=generator)]
        target[position, tensors["indices"][chosen].long()] = tensors["values"][chosen].float()
    return target


def initial_parts(
    config: RecordsConfig, image_shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """The initial images, in pixel units: N(init_mean, init_std); with the pyramid, zeros at halved resolutions."""
    c, h, w = image_shape
    parts = [config.init_mean + config.init_std * torch.randn(config.batch_size, c, h, w, generator=generator)]
    if config.parametrisation == "pyramid":
        parts += [torch.zeros(config.batch_size, c, *size) for size in pyramid_sizes(h, w)[1:]]
    return [part.to(device) for part in parts]


@contextmanager
def frozen_dropout(network: nn.Module, dropout: str, seed: int) -> Iterator[None]:
    """With "frozen": while open, every dropout layer keeps one mask for the whole batch: the paper's variant."""
    layers = [m for m in network.modules() if isinstance(m, nn.Dropout | nn.Dropout1d | nn.Dropout2d)]
    if dropout == "off" or not layers:
        if dropout == "frozen":
            raise ValueError("synthesis.dropout=frozen: the teacher has no dropout layer; leave it out")
        yield
        return
    generator = torch.Generator().manual_seed(seed)
    masks: dict[nn.Module, Tensor] = {}

    def forward(layer: Any, x: Tensor) -> Tensor:
        if layer not in masks:
            # One mask over units for all images of the batch.
            kept = torch.rand(1, *x.shape[1:], generator=generator) >= layer.p
            masks[layer] = (kept / (1 - layer.p)).to(x.device)
        return x * masks[layer].to(x.dtype)

    for layer in layers:
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def record_term(record: Record, values: taps.Values, targets: Sequence[Tensor], residual: bool) -> Tensor:
    """The record's loss, averaged over images; see the module docstring."""
    kind, temperature = record.info.kind, record.info.temperature
    if kind not in SPECTRAL:
        outputs = taps.scaled_outputs(values, temperature)
        outputs = outputs if kind == "all" else outputs[-1:]
        terms = [
            (target.relu() - output.relu()).square().mean() for target, output in zip(targets, outputs, strict=True)
        ]
        return torch.stack(terms).sum()
    signals = taps.basis_signals(kind, values, temperature)
    if not residual:
        found = [spectral.coefficients(signal, basis) for signal, basis in zip(signals, record.bases, strict=True)]
        distance = (targets[0] - torch.cat(found, dim=1)).square().sum()
    else:
        distance = torch.stack([(t - s).square().sum() for t, s in zip(targets, signals, strict=True)]).sum()
    num_units = sum(signal.shape[1] for signal in signals)
    return distance / (len(targets[0]) * num_units)


def reconstruct(
    network: nn.Module,
    found: Sequence[taps.Tap],
    record: Record,
    config: RecordsConfig,
    space: PixelSpace,
    parts: Sequence[Tensor],
    targets: Sequence[Tensor],
    labels: Tensor,
) -> tuple[Tensor, int]:
    """Optimise the parts of images; returns the images (normalised) and the steps taken.

    `FloatingPointError` when the loss is no longer finite.
    """
    mean, std = space.per_channel(labels.device)
    variables = [part.clone().requires_grad_(True) for part in parts]
    optimiser = devices.Adam(variables, lr=config.learning_rate)
    bn = batchnorm.recorded(network) if config.bn_weight else nullcontext(None)

    def pixels() -> Tensor:
        composed = compose(variables)
        return composed.clamp(space.low, space.high) if config.clamp else composed

    with bn as statistics, taps.recorded(network, found) as values:
        for step in range(config.num_steps):
            set_learning_rate(optimiser, config, step)
            if statistics is not None:
                statistics.clear()
            images = (pixels() - mean) / std
            with devices.autocast(config.precision, images.device):
                logits = network(devices.laid_out(images, network, channels_last=config.channels_last)).float()
            own = terms(config, record, values, targets, images, logits, labels, statistics)
            # Summed over images, not averaged: with smaller gradients Adam's epsilon would depend on the batch size.
            loss = len(labels) * total(config, own)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            looked_at(loss, step + 1, config.num_steps)
    return ((pixels() - mean) / std).detach(), config.num_steps


def terms(
    config: RecordsConfig,
    record: Record,
    values: taps.Values,
    targets: Sequence[Tensor],
    images: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: batchnorm.Statistics | None,
) -> dict[str, Tensor]:
    """All unweighted terms by name; costly terms with weight 0 are left out."""
    found = {"record": record_term(record, values, targets, config.residual)}
    found |= {"label": F.cross_entropy(logits, labels), "tv": losses.total_variation(images)}
    if statistics is not None:
        found["bn"] = bn_term(statistics, images.device)
    return found


@torch.no_grad()
def measure(
    network: nn.Module,
    found: Sequence[taps.Tap],
    record: Record,
    config: RecordsConfig,
    images: Tensor,
    targets: Sequence[Tensor],
    labels: Tensor,
) -> dict[str, Any]:
    """The terms of the stored images; also teacher confidence, label agreement, class histogram."""
    images = devices.laid_out(images, network, channels_last=config.channels_last)
    bn = batchnorm.recorded(network) if config.bn_weight else nullcontext(None)
    with bn as statistics, taps.recorded(network, found) as values:
        with devices.autocast(config.precision, images.device):
            logits = network(images).float()
        own = terms(config, record, values, targets, images, logits, labels, statistics)
    return measured(own, logits, Aim(labels, SOFTMAX))
