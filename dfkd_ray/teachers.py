"""Trains teachers on real data: OneCycle SGD, shift and flip, bfloat16; a resumed run gives the same numbers.

Every random draw is a function of (seed, epoch, step). The test set is read once, after the last epoch: nothing is
selected on it.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_ray import checkpoints, devices, models, storage
from dfkd_ray.batches import mix_seed
from dfkd_ray.bundles import BundleInfo, freeze
from dfkd_ray.compression import unreached
from dfkd_ray.config import TeacherTrainingConfig, config_hash
from dfkd_ray.data import LabelledImages
from dfkd_ray.images import PixelSpace, decode, flip_images, shift_images
from dfkd_ray.text import one_line

log = logging.getLogger(__name__)
CHECKPOINT = checkpoints.FILE
Progress = Callable[[str, int, int, Mapping[str, float | int]], None]


def split(num_images: int, num_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices for training and for validation, from one seeded shuffle. `ValueError` if nothing is left to train on."""
    if num_validation >= num_images:
        raise ValueError(f"num_validation={num_validation} leaves none of the {num_images} training images")
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(mix_seed(seed, 0x5A11D)))
    return order[: num_images - num_validation], order[num_images - num_validation :]


def channel_statistics(data: LabelledImages, indices: Tensor, largest: int = 10_000) -> PixelSpace:
    """Per-channel mean and standard deviation over (at most `largest`) training images, rounded to 4 digits."""
    pixels = data.read(indices[:largest]).double() / 255
    mean = pixels.mean(dim=(0, 2, 3))
    std = pixels.std(dim=(0, 2, 3), correction=0)
    if float(std.min()) < 1e-6:
        channel = int(std.argmin())
        raise ValueError(
            f"{one_line(data.name, 80)}: channel {channel} is {float(mean[channel]):.4g} in every pixel of the "
            f"{min(len(indices), largest):,} training images looked at: there is nothing to learn from it"
        )
    std = std.clamp_min(1e-3)
    return PixelSpace(tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist()))


def one_cycle(step: int, num_steps: int, peak: float, warmup: float = 0.3) -> float:
    """OneCycle learning rate with cosine annealing: from peak / 25 up to the peak, then down to zero.

    Source: Smith and Topin 2017, arXiv 1708.07120.
    """
    rise = max(1, round(num_steps * warmup))
    if step < rise:
        return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2)
    return peak * (1 + math.cos(math.pi * (step - rise) / max(1, num_steps - rise))) / 2


def train(
    config: TeacherTrainingConfig,
    data: LabelledImages,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[BundleInfo, nn.Module]:
    """Train a teacher; returns its bundle's info (no test accuracy yet) and the network in eval mode on the CPU.

    With a `checkpoint` folder, the state is stored there after every epoch, and training resumes from it if it belongs
    to this config. `FloatingPointError` if the loss is not finite.
    """
    device = devices.resolve(config.device)
    train_indices, _ = split(len(data), config.num_validation, config.seed)
    space = channel_statistics(data, train_indices)
    num_classes = len(data.class_names)
    torch.manual_seed(config.seed)  # layer initialisation uses the global generator
    network = models.build(config.architecture, config.arguments, num_classes=num_classes, image_shape=data.image_shape)
    network = devices.place(network, device)
    optimiser = make_optimiser(network, config)
    first_epoch = read_checkpoint(checkpoint, config, network, optimiser) if checkpoint else 0

    steps_per_epoch = max(1, len(train_indices) // config.batch_size)
    num_steps = steps_per_epoch * config.num_epochs
    first = decode(data.read(train_indices[:1]), space, device)
    with devices.numerics(config.precision, device, config.num_threads), unreached.zero_gradients(network, first):
        for epoch in range(first_epoch, config.num_epochs):
            network.train()
            order = torch.randperm(
                len(train_indices), generator=torch.Generator().manual_seed(mix_seed(config.seed, epoch))
            )
            total_loss = torch.zeros((), device=device)
            for step in range(steps_per_epoch):
                rows = train_indices[order[step * config.batch_size : (step + 1) * config.batch_size]]
                generator = torch.Generator().manual_seed(mix_seed(config.seed, epoch, step))
                torch.manual_seed(mix_seed(config.seed, epoch, step, 1))  # dropout uses the global generator
                images = decode(data.read(rows), space, device)
                images = shift_images(images, config.shift, space.bounds(device)[0], generator)
                if config.flip:
                    images = flip_images(images, generator)
                for group in optimiser.param_groups:
                    group["lr"] = one_cycle(epoch * steps_per_epoch + step, num_steps, config.learning_rate)
                with devices.autocast(config.precision, device):
                    logits = network(devices.laid_out(images, network))
                loss = F.cross_entropy(logits.float(), data.labels[rows].to(device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                total_loss += loss.detach()
                if progress and (step + 1) % 20 == 0:
                    done = epoch * steps_per_epoch + step + 1
                    progress("training", done, num_steps, {"epoch": epoch + 1, "loss": float(total_loss) / (step + 1)})
            if not math.isfinite(float(total_loss)):
                raise FloatingPointError(f"training: the loss is not finite in epoch {epoch + 1}; lower learning_rate")
            if checkpoint:
                write_checkpoint(checkpoint, config, network, optimiser, epoch + 1)
    info = BundleInfo(
        architecture=config.architecture,
        arguments=config.arguments,
        num_classes=num_classes,
        input_shape=data.image_shape,
        mean=space.mean,
        std=space.std,
        class_names=data.class_names,
        dataset=data.name,
        notes={"training": config.model_dump(mode="json")},
    )
    return info, freeze(devices.place(network, torch.device("cpu"), channels_last=False))


def make_optimiser(network: nn.Module, config: TeacherTrainingConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay only on weights with two or more dimensions."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return devices.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def write_checkpoint(
    folder: Path, config: TeacherTrainingConfig, network: nn.Module, optimiser: torch.optim.SGD, num_epochs: int
) -> None:
    """Write weights, momentum and the number of finished epochs atomically into one file."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    state = {"config": config_hash(config), "num_epochs": num_epochs}
    checkpoints.write(storage.folder(folder), tensors, optimiser, state)


def read_checkpoint(folder: Path, config: TeacherTrainingConfig, network: nn.Module, optimiser: torch.optim.SGD) -> int:
    """Restore a checkpoint of this config; returns the number of finished epochs, 0 if there is none.

    A checkpoint that is damaged or does not fit is logged and ignored.
    """
    try:
        found = checkpoints.read(storage.folder(folder), network)
        if found is None or found[0].get("config") != config_hash(config):
            return 0
        plain, tensors = found
        num_epochs = checkpoints.counter(plain, "num_epochs", config.num_epochs)
        weights = checkpoints.part(tensors, "network.", network.state_dict())
        momenta = checkpoints.momenta(tensors, optimiser)
    except ValueError as error:
        log.warning("%s is not used, the training starts anew: %s", folder / CHECKPOINT, error)
        return 0
    network.load_state_dict(weights)
    checkpoints.put_momenta(momenta, optimiser)
    return num_epochs
