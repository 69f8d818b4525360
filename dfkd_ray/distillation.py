"""Knowledge distillation into a pruned or new student, on given images.

Every random draw is a function of (seed, step), so a resumed run gives the same numbers as an uninterrupted one. The
returned student is the one with the lowest KL divergence on the reference set; test data is never used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, distillation_state, features, losses, pairing, storage
from dfkd_ray.batches import mix_seed
from dfkd_ray.compression import pruning, unreached
from dfkd_ray.config import DistillationConfig, PruningConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation_state import Clock, State
from dfkd_ray.evaluation import Reference
from dfkd_ray.features import Maps
from dfkd_ray.images import decode, flip_images, mix_images, shift_images
from dfkd_ray.storage import Where

Progress = Callable[[str, int, int, Mapping[str, float | int]], None]
OnEpochs = Callable[[Sequence[Mapping[str, float | int | None]]], None]


@dataclass(frozen=True)
class Pool:
    """Training images, as stored: `images` (n, c, h, w), `labels` int64 (n,), -1 without a label."""

    images: np.ndarray
    labels: np.ndarray


# (step, student before that step) → the images for that step: all images, or those of the rounds so far.
PoolAt = Callable[[int, nn.Module], Pool]


@dataclass(frozen=True)
class Observer:
    """Callbacks of a distillation. `row` has the trial's columns so far; `look` receives it at each evaluation."""

    progress: Progress | None = None
    look: Callable[[Mapping[str, Any], State], None] | None = None
    epochs: OnEpochs | None = None
    row: Mapping[str, Any] = field(default_factory=dict)

    def looked(self, state: State) -> None:
        """Report an evaluation on the reference set."""
        if self.look:
            self.look(self.row, state)


NOBODY = Observer()


def learning_rate(config: DistillationConfig, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = round(config.warmup * config.num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, config.num_steps - warmup))) / 2


def rows_of(config: DistillationConfig, num_images: int, step: int) -> Tensor:
    """The rows of the images for a step: consecutive in the epoch's permutation, a function of (seed, step)."""
    size = min(config.batch_size, num_images)
    per_epoch = num_images // size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(mix_seed(config.seed, 1, epoch)))
    return order[position * size : (position + 1) * size]


def linear_inputs(network: nn.Module, wanted: bool) -> AbstractContextManager[list[Tensor]]:
    """`features.last_linear_inputs` if they are wanted; `ValueError` for a network without a Linear layer."""
    if not wanted:
        return nullcontext([])
    if features.last_linear(network) is None:
        raise ValueError("distillation.feature_weight needs a network with a Linear layer; set it to 0")
    return features.last_linear_inputs(network)


def maps(network: nn.Module, wanted: bool) -> AbstractContextManager[Maps]:
    """`features.last_maps` if they are wanted."""
    return features.last_maps(network) if wanted else nullcontext({})


def attention_loss(student: Maps, teacher: Maps) -> Tensor:
    """The distances of attention maps, summed over the sizes that both networks have; `ValueError` if there is none.

    Source: Micaelli and Storkey 2019, arXiv 1905.09768, equation 1, on the last map of each size.
    """
    shared = [size for size in teacher if size in student]
    if not shared:
        sizes = [", ".join("x".join(map(str, size)) for size in found) or "none" for found in (student, teacher)]
        raise ValueError(
            "distillation.attention_weight compares feature maps of equal height and width; the student's are "
            f"{sizes[0]}, the teacher's {sizes[1]}; set it to 0 for this pair"
        )
    terms = [losses.attention_distance(student[size].float(), teacher[size].float()) for size in shared]
    return torch.stack(terms).sum()


def set_mode(student: nn.Module, bn_mode: str) -> None:
    """Set train mode, but BatchNorm layers to eval mode unless `bn_mode` trains them on batch statistics."""
    student.train()
    if bn_mode not in ("trained", "paired"):
        for layer in batchnorm.layers(student):
            layer.eval()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    pool_at: PoolAt,
    config: DistillationConfig,
    pruned: pruning.Pruned,
    reference: Reference,
    *,
    checkpoint: Where | None = None,
    observer: Observer = NOBODY,
) -> State:
    """Train `student` in place; at the end it is in eval mode with the selected weights. Returns the final state.

    The masks of `pruned` keep pruned weights at zero after every step; the cubic schedule recomputes them during
    training. Networks run with the runtime of `reference`. `checkpoint` is a folder or URI. The observer's `look` is
    called after each evaluation on the reference set and before a checkpoint. Its `epochs` receives all evaluations so
    far just before each checkpoint, so they are stored before the checkpoint exists. `FloatingPointError` if the loss
    is not finite.
    """
    runtime, masks, progress = reference.runtime, pruned.masks, observer.progress
    device, place = runtime.device, None if checkpoint is None else storage.folder(checkpoint)
    optimiser = devices.SGD(
        decay_groups(student, config.weight_decay), lr=config.learning_rate, momentum=config.momentum, nesterov=False
    )
    found = distillation_state.read(place, student, optimiser, config.num_steps) if place else None
    state = found or State()
    clock = Clock(state.earlier_s)
    if found:
        masks = {name: weight.detach() != 0 for name, weight in pruning.prunable(student).items() if name in masks}
    gpus = [device] if device.type == "cuda" else []
    is_paired = config.bn_mode == "paired"
    last_pruning = last_pruning_step(pruned.config, config.num_steps)
    with (
        runtime.numerics(),
        torch.random.fork_rng(devices=gpus),
        linear_inputs(student, config.feature_weight > 0) as student_features,
        linear_inputs(teacher, config.feature_weight > 0) as teacher_features,
        maps(student, config.attention_weight > 0) as student_maps,
        maps(teacher, config.attention_weight > 0) as teacher_maps,
        pairing.paired(student, teacher, pruned.channels) if is_paired else nullcontext() as pairs,
        unreached.zero_gradients(student, decode(reference.images[:1], runtime.space, device)),
    ):
        if state.step == 0:
            is_result = not pruned.is_new or config.num_steps == 0
            look(state, student, config, reference, {}, candidate=last_pruning < 0 and is_result)
            observer.looked(state)
        sums: dict[str, Tensor] = {}
        while state.step < config.num_steps:
            step = state.step
            if step == last_pruning or (step < last_pruning and step % pruned.config.schedule_every == 0):
                masks = cubic_masks(student, pruned.config, step, config.num_steps, final=step == last_pruning)
            generator = torch.Generator().manual_seed(mix_seed(config.seed, 2, step))
            with clock.stopped():
                pool = pool_at(step, student)
            rows = rows_of(config, len(pool.labels), step)
            images, weight, partner = augmented(pool, rows, config, runtime, generator)
            set_mode(student, config.bn_mode)
            torch.manual_seed(mix_seed(config.seed, 3, step))  # dropout uses the global generator
            student_features.clear()
            teacher_features.clear()
            student_maps.clear()
            teacher_maps.clear()
            if pairs is not None:
                pairs.seen.clear()
            with runtime.autocast():
                with torch.no_grad():
                    teacher_logits = teacher(devices.laid_out(images, teacher)).float()
                with pairs or nullcontext():
                    student_logits = student(devices.laid_out(images, student)).float()
            terms = {"kl": reference.head.kl(student_logits, teacher_logits, config.temperature)}
            if config.label_weight:
                labels = torch.from_numpy(pool.labels[rows.numpy()]).to(device)
                terms["label"] = reference.head.mixed_label_loss(student_logits, labels, partner, weight)
            if config.feature_weight:
                terms["feature"] = feature_loss(student_features[0], teacher_features[0])
            if config.attention_weight:
                terms["attention"] = attention_loss(student_maps, teacher_maps)
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
                # A student that is still being pruned is no candidate: it has not reached its sparsity yet.
                look(state, student, config, reference, means, candidate=step >= last_pruning)
                observer.looked(state)
                if config.patience and state.looks_since_best >= config.patience:
                    break
            if progress:
                shown = {name: value for name, value in state.epochs[-1].items() if value is not None}
                progress("distilling", state.step, config.num_steps, shown)
            if place and (state.step % config.checkpoint_every == 0) and state.step % config.eval_every == 0:
                if observer.epochs:
                    observer.epochs(state.epochs)
                state.seconds = clock.seconds()
                distillation_state.write(place, student, optimiser, state)
    student.load_state_dict(state.best)
    student.eval()
    state.seconds = clock.seconds()
    return state


def decay_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weight decay on weights with two or more dimensions, none on biases and BatchNorm."""
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def augmented(
    pool: Pool,
    rows: Tensor,
    config: DistillationConfig,
    runtime: Runtime,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The images of a step, normalised, shifted, flipped and mixed; also the mixing weights and partners."""
    space, device = runtime.space, runtime.device
    images = decode(pool.images[rows.numpy()], space, device)
    images = shift_images(images, config.shift, space.bounds(device)[0], generator)
    if config.flip:
        images = flip_images(images, generator)
    weight, partner = torch.ones(len(rows), device=device), torch.arange(len(rows), device=device)
    if config.mixup:
        images, weight, partner = mix_images(images, config.mixup, generator)
    return images, weight, partner


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the inputs of the last linear layers; `ValueError` if their widths differ."""
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
    """One optimiser step; pruned weights get no gradient and stay exactly zero."""
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
    """The step at which the cubic schedule prunes last, before the update; -1 for one-shot pruning."""
    if config.schedule == "one_shot":
        return -1
    return min(max(1, round(config.schedule_end * num_steps)), num_steps - 1)


def cubic_masks(student: nn.Module, config: PruningConfig, step: int, num_steps: int, *, final: bool) -> pruning.Masks:
    """Prune `student` to the schedule's sparsity at `step`. Zero weights score lowest, so no pruned weight returns."""
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
    means: dict[str, float],
    *,
    candidate: bool = True,
) -> None:
    """Evaluate on the reference set, and keep a copy of the student if it is the best candidate so far."""
    agreement, kl = reference.compare(student)
    rate = learning_rate(config, state.step - 1) if state.step else None
    measured = {"step": state.step, "agreement": agreement, "reference_kl": kl, **means}
    state.epochs.append({**measured, "learning_rate": rate, "sparsity": pruning.achieved_sparsity(student)})
    if candidate and (kl < state.best_kl or not state.best):
        state.best_agreement, state.best_kl, state.best_step = agreement, kl, state.step
        state.best = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
        state.looks_since_best = 0
    else:
        state.looks_since_best += int(candidate)
