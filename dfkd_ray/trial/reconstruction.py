"""The rung between pruning and distillation: layer-wise reconstruction on a trial's images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import devices, distillation
from dfkd_ray.batches import mix_seed
from dfkd_ray.compression import layerwise, pruning, saliency
from dfkd_ray.compression.selection import Selection
from dfkd_ray.config import FROM_IMAGES, TrialConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool
from dfkd_ray.images import decode
from dfkd_ray.text import one_line

NUM_SCORING = 512  # images for the scores of a criterion
NO_FASTER = (
    "N:M zeros save time only where a runtime has kernels for them: linear layers on NVIDIA GPUs since Ampere (2:4); "
    "exported files are dense"
)
MOST_REPEATS = 4  # times that an image is taken for reconstruction: once as it is, the others shifted, flipped, mixed


def applies(config: TrialConfig, masks: pruning.Masks | None = None) -> bool:
    """Whether a trial has this rung: a pruned copy of the teacher, whose masks and statistics may change.

    `masks`: those of the student, where they are known; a file's zeros are masked without `pruning.sparsity` too. A
    network of the teacher's architecture has layers of the teacher's shapes, whatever its weights.
    """
    return config.reconstructs and (config.pruning.sparsity > 0 or bool(masks))


def masks(student: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime) -> tuple[pruning.Masks, list[str]]:
    """The masks of a dense student, empty without pruning; and warnings."""
    if config.pruning.sparsity == 0:
        return {}, []
    scores, warnings = scored(student, config, pool, runtime)
    if config.pruning.structure != "n_of_m":
        return pruning.masks(student, config.pruning, saliencies=scores), warnings
    found, dense = pruning.pattern_masks(student, config.pruning, scores)
    warnings.append(NO_FASTER)
    if dense:
        names = one_line(", ".join(dense), 120)
        warnings.append(f"dense, as their inputs are no multiple of {config.pruning.kept_of[1]}: {names}")
    return found, warnings


def scored(
    student: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime
) -> tuple[pruning.Weights | None, list[str]]:
    """The scores of weights from images, and warnings; None for a criterion that needs none."""
    criterion = config.pruning.criterion
    if criterion not in FROM_IMAGES:
        return None, []
    scores = saliency.saliencies(student, scoring_images(student, config, pool, runtime), criterion)
    squares = pruning.squares(pruning.prunable(student))
    unseen = ", ".join(name for name in squares if name not in scores)
    if not unseen:
        return squares | scores, []
    warning = f"pruning.criterion={criterion} sees no inputs, or too many, of {one_line(unseen, 120)}: scored by w²"
    return squares | scores, [warning]


def scoring_images(student: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime) -> Tensor:
    """The images that a dense student's weights or channels are scored with: `NUM_SCORING`, or what memory allows."""
    images = fitting_images(student, config, pool, runtime)
    return images(layerwise.look_at(student.eval(), images(2)).num_images(NUM_SCORING))


def fitting_images(student: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime) -> Callable[[int], Tensor]:
    """A function of n: n images, up to half of them each as it is, the others shifted, flipped and mixed."""

    def images(n: int) -> Tensor:
        plain = np.arange(min((n + 1) // 2, len(pool.labels)))
        others = torch.from_numpy(np.arange(len(plain), n) % len(pool.labels))
        generator = torch.Generator().manual_seed(mix_seed(config.distillation.seed, 4))
        parts = [decode(pool.images[plain], runtime.space, runtime.device)]
        if len(others):
            parts.append(distillation.augmented(pool, others, config.distillation, runtime, generator)[0])
        return devices.laid_out(torch.cat(parts), student)

    return images


def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    config: TrialConfig,
    pool: Pool,
    runtime: Runtime,
    masks: pruning.Masks,
    *,
    reselect: bool,
) -> tuple[pruning.Masks | None, list[str]]:
    """Reconstruct a pruned student in place; its masks then, None if it failed, and warnings.

    `reselect`: other weights than those of `masks` may stay. The caller restores one that was not reconstructed.

    Of a student from a file, only the zeros matter: its layers are fitted to the teacher's, and everything between
    them (BatchNorm, say) becomes the teacher's.
    """
    if config.student.weights is not None:
        own, weights = teacher.state_dict(), pruning.prunable(student)
        student.load_state_dict({name: own[name] for name in own if name not in weights}, strict=False)
    settings = config.reconstruction
    wanted = min(settings.num_images, MOST_REPEATS * len(pool.labels))
    images = fitting_images(student, config, pool, runtime)
    try:
        chosen = selection(config) if reselect else None
        done = layerwise.reconstruct(student, teacher, images, wanted, masks, ridge=settings.ridge, selection=chosen)
    except ValueError as error:
        return None, [f"no layer-wise reconstruction: {error}"]
    warnings = []
    if done.num_images < wanted:
        warnings.append(
            f"layer-wise reconstruction took {done.num_images:,} of {wanted:,} images: more would take over "
            f"{layerwise.MEMORY / (1 << 30):.3g} GiB"
        )
    if done.too_large:
        warnings.append(
            f"layer-wise reconstruction left out {one_line(', '.join(done.too_large), 120)}: too many inputs or outputs"
        )
    if done.not_chosen:
        warnings.append(
            f"layer-wise reconstruction kept the weights that the criterion keeps of "
            f"{one_line(', '.join(done.not_chosen), 120)}: too many inputs to choose among"
        )
    return done.masks, warnings


def selection(config: TrialConfig) -> Selection:
    """How the weights that stay are chosen anew."""
    return Selection(config.pruning.kept_of[1] if config.pruning.structure == "n_of_m" else None)
