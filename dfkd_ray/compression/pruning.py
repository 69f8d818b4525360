"""Pruning of single weights: criteria, masks with an exact number of zeros, N:M patterns, and the cubic schedule.

A criterion scores every prunable weight. The lowest scores are pruned first, ties by position, so the number of zeros
is exact. Sparsity is the fraction of zeros over all Conv and Linear weights, including the layers that are spared.
Adding a criterion is one function and one line in `CRITERIA`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from dfkd_ray.config import FROM_IMAGES, PruningConfig

Weights = dict[str, Tensor]
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Pruned:
    """The pruning state of a network: the config and the current masks (1: the weight is kept).

    `channels`: layer → the output channels that it has kept, of layers that have lost some. `is_new`: the weights are
    random ones, not pruned: such a network is no result before it is trained.
    """

    config: PruningConfig
    masks: Masks = field(default_factory=dict)
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_new: bool = False


KINDS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def prunable(network: nn.Module) -> Weights:
    """Convolution and linear weights by state-dict name, each tensor once. `ValueError` for computed weights."""
    found: Weights = {}
    seen: set[int] = set()
    for name, module in network.named_modules():
        if isinstance(module, KINDS) and "weight" not in module._parameters:
            raise ValueError(
                f"layer {name or type(module).__name__} computes its weight from other tensors: a pruned one would not "
                "stay zero; make it a plain parameter (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if isinstance(module, KINDS) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight" if name else "weight"] = module.weight
    return found


def magnitude_scores(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w|, compared over all layers."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def squares(weights: Mapping[str, Tensor]) -> Weights:
    """w², float64."""
    return {name: weight.detach().double().square() for name, weight in weights.items()}


def lamp_scores(saliencies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A weight's saliency over the sum of those of the layer's weights that are at least as large.

    Source: Lee et al. 2021, arXiv 2010.07611, equation 3, where the saliency is w². The largest of a layer scores 1: no
    layer is emptied.
    """
    scores = {}
    for name, saliency in saliencies.items():
        squares = saliency.detach().double().flatten()
        order = torch.argsort(squares, stable=True)
        remaining = squares[order].flip(0).cumsum(0).flip(0)
        score = torch.empty_like(squares)
        score[order] = squares[order] / remaining.clamp_min(torch.finfo(squares.dtype).tiny)
        scores[name] = score.view_as(saliency)
    return scores


def lowest(scores: Mapping[str, Tensor], num_zeros: int) -> Masks:
    """Masks (True: kept) that drop the `num_zeros` lowest scores over all tensors together."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[torch.argsort(flat, stable=True)[:num_zeros]] = False
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def global_magnitude(weights: Mapping[str, Tensor], num_zeros: int) -> Masks:
    """Smallest magnitudes over all layers. Source: Tripurwar et al. 2025, arXiv 2511.20702."""
    return lowest(magnitude_scores(weights), num_zeros)


def lamp(weights: Mapping[str, Tensor], num_zeros: int) -> Masks:
    """Lowest LAMP scores of w² over all layers."""
    return lowest(lamp_scores(squares(weights)), num_zeros)


def uniform(weights: Mapping[str, Tensor], num_zeros: int) -> Masks:
    """Smallest magnitudes, the same fraction in each layer; the largest remainders are rounded up."""
    sizes = {name: weight.numel() for name, weight in weights.items()}
    total = sum(sizes.values())
    exact = {name: num_zeros * size / total for name, size in sizes.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: num_zeros - sum(counts.values())]:
        counts[name] += 1
    return smallest(weights, counts)


def smallest(weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> Masks:
    """Masks that drop the `counts` smallest magnitudes of each layer."""
    scores = magnitude_scores(weights)
    return {name: lowest({name: scores[name]}, counts[name])[name] for name in weights}


def erk(weights: Mapping[str, Tensor], num_zeros: int) -> Masks:
    """Smallest magnitudes in each layer; a layer's density is proportional to the sum of its sizes over their product.

    Source: Evci et al. 2020, arXiv 1911.11134, section 3 (Erdős–Rényi kernel). Layers that would be denser than dense
    stay dense. Rounding falls on the largest layers.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    ratio = {name: sum(weight.shape) / weight.numel() for name, weight in weights.items()}
    num_kept, dense = sum(sizes.values()) - num_zeros, set[str]()
    while True:
        open_layers = [name for name in weights if name not in dense]
        rest = num_kept - sum(sizes[name] for name in dense)
        share = rest / max(1e-30, sum(ratio[name] * sizes[name] for name in open_layers))
        too_dense = {name for name in open_layers if share * ratio[name] > 1}
        if not too_dense:
            break
        dense |= too_dense
    kept = {name: sizes[name] if name in dense else int(share * ratio[name] * sizes[name]) for name in weights}
    missing = num_kept - sum(kept.values())
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        more = min(missing, sizes[name] - kept[name])
        kept[name], missing = kept[name] + more, missing - more
    return smallest(weights, {name: sizes[name] - kept[name] for name in weights})


def neighbours(weight: Tensor, name: str, network: nn.Module) -> Tensor:
    """A weight with its input channels last; those of a convolution's group are neighbours."""
    module = network.get_submodule(name.rpartition(".")[0])
    if not isinstance(module, _ConvTransposeNd):
        return weight.movedim(1, -1)
    split = weight.reshape(module.groups, -1, *weight.shape[1:])  # (groups, inputs, outputs, …)
    return split.movedim(1, -1)


def n_of_m(network: nn.Module, scores: Mapping[str, Tensor], kept: int, of: int) -> tuple[Masks, list[str]]:
    """Masks that keep the `kept` highest scores of each `of` neighbours along a layer's inputs; ties by position.

    Also the layers that stay dense, because their inputs are no multiple of `of`. Source of 2:4: Mishra et al. 2021,
    arXiv 2104.08378, section 3.
    """
    masks, dense = {}, []
    for name, score in scores.items():
        if neighbours(score, name, network).shape[-1] % of:
            dense.append(name.rpartition(".")[0])
            masks[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        mask = torch.zeros_like(score, dtype=torch.bool)
        view = neighbours(mask, name, network)  # a view: what is written there is in the mask
        groups = neighbours(score, name, network).unflatten(-1, (-1, of))
        best = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., :kept]
        view.copy_(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2))
        masks[name] = mask
    return masks, dense


CRITERIA: dict[str, Callable[[Mapping[str, Tensor], int], Masks]] = {
    "global_magnitude": global_magnitude,
    "uniform": uniform,
    "lamp": lamp,
    "erk": erk,
}


def masks(
    network: nn.Module,
    config: PruningConfig,
    sparsity: float | None = None,
    saliencies: Mapping[str, Tensor] | None = None,
) -> Masks:
    """The masks for `sparsity` (default: the config's) on the network's current weights; the network is not changed.

    `saliencies`: of every prunable weight, for a criterion that scores with images; LAMP scores of them are compared.
    `ValueError` if the layers that are not spared have too few weights, or if nothing is prunable.
    """
    sparsity = config.sparsity if sparsity is None else sparsity
    weights = prunable(network)
    chosen = not_spared(weights, config)
    total = sum(weight.numel() for weight in weights.values())
    num_zeros = round(sparsity * total)
    available = sum(weight.numel() for weight in chosen.values())
    if num_zeros > available:
        raise ValueError(
            f"pruning.sparsity={sparsity}: {num_zeros} of {total} weights must go, but only {available} are not spared"
        )
    result = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    if config.criterion in FROM_IMAGES:
        assert saliencies is not None, "this criterion scores with images"
        return result | lowest(lamp_scores({name: saliencies[name] for name in chosen}), num_zeros)
    return result | CRITERIA[config.criterion](chosen, num_zeros)


def not_spared(weights: Mapping[str, Tensor], config: PruningConfig) -> Weights:
    """The weights that may be pruned. `ValueError` if there are none."""
    if not weights:
        raise ValueError("the network has no Conv or Linear weight to prune")
    chosen = dict(weights)
    convolutions = [name for name, weight in weights.items() if weight.ndim > 2]
    linears = [name for name, weight in weights.items() if weight.ndim == 2]
    if config.spare_first and convolutions:
        chosen.pop(convolutions[0], None)
    if config.spare_last and linears:
        chosen.pop(linears[-1], None)
    return chosen


def pattern_masks(
    network: nn.Module, config: PruningConfig, saliencies: Mapping[str, Tensor] | None = None
) -> tuple[Masks, list[str]]:
    """The masks of `structure=n_of_m` on the network's current weights, and the layers that stay dense.

    `saliencies`: of every prunable weight, for a criterion that scores with images; else |w| decides. `ValueError` if
    no layer can have the pattern.
    """
    weights = prunable(network)
    chosen = not_spared(weights, config)
    scores = magnitude_scores(chosen) if saliencies is None else {name: saliencies[name] for name in chosen}
    found, dense = n_of_m(network, scores, *config.kept_of)
    if len(dense) == len(chosen):
        raise ValueError(
            f"pruning.pattern={config.pattern}: no layer of this network has a multiple of {config.kept_of[1]} input "
            "channels; take pruning.structure=unstructured"
        )
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()} | found, dense


@torch.no_grad()
def apply(network: nn.Module, masks: Masks) -> None:
    """Set the pruned weights to exactly zero."""
    for name, weight in prunable(network).items():
        if name in masks:
            weight.masked_fill_(~masks[name], 0.0)


def cubic_sparsity(step: int, num_steps: int, end: float, final: float) -> float:
    """The sparsity final (1 - (1 - t)³) at `step`, where t is the elapsed fraction of the `end` · `num_steps` ramp.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1, from zero sparsity.
    """
    ramp = max(1, round(end * num_steps))
    t = min(1.0, step / ramp)
    return final * (1 - (1 - t) ** 3)


def achieved_sparsity(network: nn.Module) -> float:
    """The fraction of zeros over all Conv and Linear weights, counted in the tensors."""
    weights = prunable(network).values()
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))


def num_parameters(network: nn.Module) -> int:
    """Parameters of the whole network, biases and BatchNorm included."""
    return sum(parameter.numel() for parameter in network.parameters())


def num_nonzero(network: nn.Module) -> int:
    """Non-zero parameters of the whole network, biases and BatchNorm included."""
    return sum(int((parameter != 0).sum()) for parameter in network.parameters())
