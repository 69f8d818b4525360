"""The rung between pruning and distillation: layer-wise reconstruction on a trial's images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import devices, distillation
from dfkd_ray.batches import mix_seed
from dfkd_ray.compression import layerwise, pruning, saliency
from dfkd_ray.config import FROM_IMAGES, TrialConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool
from dfkd_ray.images import decode

NUM_SCORING = 512  # images for the scores of a criterion


def applies(config: TrialConfig) -> bool:
    """Whether a trial has this rung: a pruned copy of the teacher, whose masks and statistics may change."""
    return (
        config.reconstruction.num_images > 0
        and config.pruning.sparsity > 0
        and config.pruning.schedule == "one_shot"
        and config.student.architecture is None
        and config.distillation.bn_mode != "frozen"
    )


def masks(student: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime) -> pruning.Masks:
    """The masks of a dense student; empty without pruning."""
    if config.pruning.sparsity == 0:
        return {}
    scores = None
    if config.pruning.criterion in FROM_IMAGES:
        scores = saliency.saliencies(
            student, fitting_images(student, config, pool, runtime)(512), config.pruning.criterion
        )
    return pruning.masks(student, config.pruning, saliencies=scores)


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
    student: nn.Module, teacher: nn.Module, config: TrialConfig, pool: Pool, runtime: Runtime, masks: pruning.Masks
) -> str | None:
    """Reconstruct a pruned student in place; returns a warning, or None. A student that cannot be is left as it was."""
    settings = config.reconstruction
    try:
        used = layerwise.reconstruct(
            student,
            teacher,
            fitting_images(student, config, pool, runtime),
            settings.num_images,
            masks,
            ridge=settings.ridge,
        )
    except ValueError as error:
        return f"no layer-wise reconstruction: {error}"
    if used < settings.num_images:
        return (
            f"layer-wise reconstruction took {used:,} of reconstruction.num_images={settings.num_images:,}: more would "
            f"take over {layerwise.MEMORY >> 30} GiB"
        )
    return None
