"""Structured pruning in a trial: which channels go, and the small network in the place of the masked one."""

import json
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from dfkd_ray import devices
from dfkd_ray.bundles import BundleInfo, Teacher
from dfkd_ray.compression import channels
from dfkd_ray.compression.channels import Choice, Prepared
from dfkd_ray.config import TrialConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool
from dfkd_ray.storage import Folder
from dfkd_ray.trial import speed
from dfkd_ray.trial.reconstruction import scoring_images
from dfkd_ray.untrusted import reason

Key = TypeVar("Key")
CHOICE = "channels.json"  # in a trial's checkpoint folder


def applies(config: TrialConfig) -> bool:
    """Whether a trial removes channels."""
    return config.pruning.structure == "channels" and config.pruning.sparsity > 0


def prepared(student: nn.Module, config: TrialConfig, teacher: Teacher) -> Prepared | None:
    """What can be removed from a student, found before there are images; None without structured pruning.

    `ValueError` if nothing can be.
    """
    if not applies(config):
        return None
    return channels.prepare(student, teacher.info.image_shape, config.pruning.importance)


def chosen(
    student: nn.Module,
    found: Prepared,
    config: TrialConfig,
    info: BundleInfo,
    pool: Pool,
    runtime: Runtime,
    checkpoint: Folder | None,
) -> Choice:
    """The channels to remove from a dense student. `ValueError` if so many cannot be.

    A choice by measured latency is stored in the trial's checkpoint folder: measured again, it could be another one.
    """
    images = None
    if config.pruning.importance == "activations":
        images = scoring_images(student, config, pool, runtime)
    if config.pruning.target != "latency":
        return channels.choose(student, found, config.pruning, images)
    measure = speed.removed_seconds(config.latency, student, info.input_shape, runtime.device)
    ratio = None if checkpoint is None else read_ratio(checkpoint)
    choice = channels.choose(student, found, config.pruning, images, measure, ratio)
    if checkpoint is not None and ratio is None:
        checkpoint.write(CHOICE, json.dumps({"ratio": choice.ratio}).encode())
    return choice


def read_ratio(folder: Folder) -> float | None:
    """The ratio of removed units that an interrupted run of the trial chose; None without one."""
    data = folder.read(CHOICE)
    try:
        ratio = None if data is None else json.loads(data)["ratio"]
    except (ValueError, KeyError, TypeError):
        return None
    return float(ratio) if isinstance(ratio, int | float) and 0 <= ratio <= 1 else None


def small(
    masked: nn.Module, states: Mapping[Key, Mapping[str, Tensor]], choice: Choice, images: Tensor
) -> tuple[nn.Module, dict[Key, dict[str, Tensor]]]:
    """The network without the masked channels, and states of the masked one in its shape.

    `ValueError` if its logits on the images are not the same, to rounding, or if it does not run: a network may take
    some numbers of channels and not others.
    """
    network = channels.sliced(masked, choice.edits)
    masked.eval()
    try:
        channels.check_equal(masked, network.eval(), images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            "pruning.structure=channels: the network without the chosen channels does not run, or computes something "
            f"else ({reason(error, 100)}); try another pruning.round_to"
        ) from error
    smaller = {key: channels.sliced(masked, choice.edits, state).state_dict() for key, state in states.items()}
    return devices.place(network, images.device), smaller
