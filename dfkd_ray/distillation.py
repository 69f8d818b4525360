"""Knowledge distillation into a pruned or new student, on images that are handed in.

Every random draw is a function of (seed, step): a resumed run gives the same numbers as an undisturbed one. The student
returned is the one with the best agreement on the reference set (ties: lower KL), never one chosen on test data.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, losses, pruning, storage
from dfkd_ray.batches import mix_seed
from dfkd_ray.config import DistillationConfig, PruningConfig
from dfkd_ray.evaluation import Reference
from dfkd_ray.images import PixelSpace, decode, flip_images, mix_images, shift_images
from dfkd_ray.storage import Folder, Where

CHECKPOINT = "state.safetensors"
Progress = Callable[[str, int, int, Mapping[str, float | int]], None]
OnEpochs = Callable[[Sequence[Mapping[str, float | int | None]]], None]
Snapshot = dict[str, Tensor]


@dataclass(frozen=True)
class Pool:
    """The images distilled on, as stored: `images` (n, c, h, w), `labels` int64 (n,), -1 without a label."""

    images: np.ndarray
    labels: np.ndarray


@dataclass
class State:
    """Where a distillation stands: what a checkpoint holds."""

    step: int = 0
    best_step: int = 0
    best_agreement: float = -1.0
    best_kl: float = math.inf
    looks_since_best: int = 0
    best: Snapshot = field(default_factory=dict)
    epochs: list[dict[str, float | int | None]] = field(default_factory=list)


def learning_rate(config: DistillationConfig, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = round(config.warmup * config.num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, config.num_steps - warmup))) / 2


def rows_of(config: DistillationConfig, num_images: int, step: int) -> Tensor:
    """Which images step `step` sees: consecutive rows of the epoch's permutation, a function of (seed, step)."""
    size = min(config.batch_size, num_images)
    per_epoch = num_images // size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(mix_seed(config.seed, 1, epoch)))
    return order[position * size : (position + 1) * size]


@contextmanager
def last_linear_inputs(network: nn.Module, wanted: bool):
    """While open, a list that each forward pass of `network` fills with the input of its last Linear layer."""
    seen: list[Tensor] = []
    handle = None
    if wanted:
        linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError("distillation.feature_weight needs a network with a Linear layer; set it to 0")
        handle = linears[-1].register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(1)))
    try:
        yield seen
    finally:
        if handle:
            handle.remove()


def set_mode(student: nn.Module, bn_mode: str) -> None:
    """Train mode, with BatchNorm layers in eval mode unless they are to be trained on batch statistics."""
    student.train()
    if bn_mode != "trained":
        for layer in batchnorm.layers(student):
            layer.eval()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    pool: Pool,
    config: DistillationConfig,
    pruning_config: PruningConfig,
    masks: pruning.Masks,
    reference: Reference,
    space: PixelSpace,
    device: torch.device,
    *,
    checkpoint: Where | None = None,
    progress: Progress | None = None,
    on_look: Callable[[State], None] | None = None,
    on_epochs: OnEpochs | None = None,
) -> State:
    """Train `student` in place (eval mode at the end, the selected weights loaded); returns what was measured.

    `masks` hold the pruned weights at zero after every step; with the cubic schedule they are made anew on the way.
    `on_look` is called after every look at the reference set, before a checkpoint is written.
    `checkpoint` is a folder or URI. `on_epochs` gets all looks so far just before each checkpoint: whoever writes them
    has written them when the checkpoint is there. `FloatingPointError` when the loss is no longer finite.
    """
    place = None if checkpoint is None else storage.folder(checkpoint)
    optimiser = torch.optim.SGD(
        decay_groups(student, config.weight_decay), lr=config.learning_rate, momentum=config.momentum, nesterov=False
    )
    found = read_checkpoint(place, student, optimiser) if place else None
    state = found or State()
    if found:
        masks = {name: weight.detach() != 0 for name, weight in pruning.prunable(student).items() if name in masks}
    precision = config.precision
    gpus = [device] if device.type == "cuda" else []
    last_pruning = last_pruning_step(pruning_config, config.num_steps)
    with (
        devices.numerics(precision, device, config.num_threads, config.fast),
        torch.random.fork_rng(devices=gpus),
        last_linear_inputs(student, config.feature_weight > 0) as student_features,
        last_linear_inputs(teacher, config.feature_weight > 0) as teacher_features,
    ):
        if state.step == 0:
            look(state, student, config, reference, space, device, {}, candidate=last_pruning < 0)
            if on_look:
                on_look(state)
        sums: dict[str, Tensor] = {}
        while state.step < config.num_steps:
            step = state.step
            if step == last_pruning or (step < last_pruning and step % pruning_config.schedule_every == 0):
                masks = cubic_masks(student, pruning_config, step, config.num_steps, final=step == last_pruning)
            generator = torch.Generator().manual_seed(mix_seed(config.seed, 2, step))
            rows = rows_of(config, len(pool.labels), step)
            images, weight, partner = augmented(pool, rows, config, space, device, generator)
            set_mode(student, config.bn_mode)
            torch.manual_seed(mix_seed(config.seed, 3, step))  # dropout draws from the global generator
            student_features.clear()
            teacher_features.clear()
            with devices.autocast(precision, device):
                with torch.no_grad():
                    teacher_logits = teacher(images).float()
                student_logits = student(images).float()
            terms = {"kl": losses.distillation_kl(student_logits, teacher_logits, config.temperature)}
            if config.label_weight:
                labels = torch.from_numpy(pool.labels[rows.numpy()]).to(device)
                terms["label"] = losses.mixed_cross_entropy(student_logits, labels, partner, weight)
            if config.feature_weight:
                terms["feature"] = feature_loss(student_features[0], teacher_features[0])
            loss = config.kl_weight * terms["kl"]
            loss = loss + sum(getattr(config, f"{name}_weight") * terms[name] for name in terms if name != "kl")
            update(student, optimiser, loss, masks, config, step)
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + term.detach()
            state.step += 1
            if state.step % config.eval_every == 0 or state.step == config.num_steps:
                steps = (state.step - 1) % config.eval_every + 1
                means = {name: float(value) / steps for name, value in sums.items()}
                means["loss"] = sum(getattr(config, f"{name}_weight") * mean for name, mean in means.items())
                sums = {}
                if not all(math.isfinite(value) for value in means.values()):
                    raise FloatingPointError(f"distillation: the loss is not finite by step {state.step}: {means}")
                # A student that is still being pruned is no candidate: it has not the sparsity asked for.
                look(state, student, config, reference, space, device, means, candidate=step >= last_pruning)
                if on_look:
                    on_look(state)
                if config.patience and state.looks_since_best >= config.patience:
                    break
            if progress:
                shown = {name: value for name, value in state.epochs[-1].items() if value is not None}
                progress("distilling", state.step, config.num_steps, shown)
            if place and (state.step % config.checkpoint_every == 0) and state.step % config.eval_every == 0:
                if on_epochs:
                    on_epochs(state.epochs)
                write_checkpoint(place, student, optimiser, state)
    student.load_state_dict(state.best)
    student.eval()
    return state


def decay_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on weights of two and more dimensions, none on biases and BatchNorm."""
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def augmented(
    pool: Pool,
    rows: Tensor,
    config: DistillationConfig,
    space: PixelSpace,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The images of a step, normalised, shifted, flipped and mixed; with mixing weights and partners."""
    images = decode(pool.images[rows.numpy()], space, device)
    images = shift_images(images, config.shift, space.bounds(device)[0], generator)
    if config.flip:
        images = flip_images(images, generator)
    weight, partner = torch.ones(len(rows), device=device), torch.arange(len(rows), device=device)
    if config.mixup:
        images, weight, partner = mix_images(images, config.mixup, generator)
    return images.contiguous(memory_format=torch.channels_last), weight, partner


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the inputs of the last linear layers; `ValueError` where their widths differ."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation.feature_weight: the student's last linear layer has {student.shape[1]} inputs, the "
            f"teacher's {teacher.shape[1]}; set it to 0 for this pair"
        )
    return torch.nn.functional.mse_loss(student.float(), teacher.float())


def update(
    student: nn.Module,
    optimiser: torch.optim.SGD,
    loss: Tensor,
    masks: pruning.Masks,
    config: DistillationConfig,
    step: int,
) -> None:
    """One optimiser step; dropped weights get no gradient and stay exactly zero."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for name, weight in pruning.prunable(student).items():
        if name in masks and weight.grad is not None:
            weight.grad.mul_(masks[name])
    torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
    optimiser.step()
    pruning.apply(student, masks)


def last_pruning_step(config: PruningConfig, num_steps: int) -> int:
    """The step before whose update the cubic schedule reaches its sparsity; -1 for one-shot pruning, done before."""
    if config.schedule == "one_shot":
        return -1
    return min(max(1, round(config.schedule_end * num_steps)), num_steps - 1)


def cubic_masks(student: nn.Module, config: PruningConfig, step: int, num_steps: int, *, final: bool) -> pruning.Masks:
    """Prune `student` to the schedule's sparsity at `step`; weights that are zero score lowest, so none comes back."""
    reached = pruning.cubic_sparsity(step, num_steps, config.schedule_end, config.sparsity)
    sparsity = config.sparsity if final else reached
    masks = pruning.masks(student, config, sparsity)
    pruning.apply(student, masks)
    return masks


def look(
    state: State,
    student: nn.Module,
    config: DistillationConfig,
    reference: Reference,
    space: PixelSpace,
    device: torch.device,
    means: dict[str, float],
    *,
    candidate: bool = True,
) -> None:
    """Compare with the teacher on the reference set, and keep a copy of the student if it is the best so far."""
    agreement, kl = reference.compare(student, space, device, config.precision)
    rate = learning_rate(config, state.step - 1) if state.step else None
    measured = {"step": state.step, "agreement": agreement, "reference_kl": kl, **means}
    state.epochs.append({**measured, "learning_rate": rate, "sparsity": pruning.achieved_sparsity(student)})
    if candidate and (agreement, -kl) > (state.best_agreement, -state.best_kl):
        state.best_agreement, state.best_kl, state.best_step = agreement, kl, state.step
        state.best = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
        state.looks_since_best = 0
    else:
        state.looks_since_best += int(candidate)


def write_checkpoint(folder: Folder, student: nn.Module, optimiser: torch.optim.SGD, state: State) -> None:
    """Student, momentum, best student and counters in one safetensors file, written whole on a disk or anywhere."""
    tensors = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        momentum = optimiser.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{index}"] = momentum
    plain = {name: value for name, value in vars(state).items() if name != "best"}
    plain["best_kl"] = state.best_kl if math.isfinite(state.best_kl) else None
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder.write(CHECKPOINT, safetensors.torch.save(tensors, {"state": json.dumps(plain)}))


def read_checkpoint(folder: Folder, student: nn.Module, optimiser: torch.optim.SGD) -> State | None:
    """Restore student and momentum in place; returns the counters and the best student, None without a checkpoint."""
    data = folder.read(CHECKPOINT)
    if data is None:
        return None
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        plain = json.loads(header["__metadata__"]["state"])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / CHECKPOINT}: damaged ({error}); remove it to start that trial again") from None
    plain["best_kl"] = math.inf if plain["best_kl"] is None else plain["best_kl"]

    def part(prefix: str) -> Snapshot:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    student.load_state_dict(part("student."))
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if f"momentum.{index}" in tensors:
            optimiser.state[parameter]["momentum_buffer"] = tensors[f"momentum.{index}"].to(parameter.device)
    return State(**plain, best=part("best."))
