"""Scores of weights from synthetic images: Wanda, and the saliency of Optimal Brain Surgeon (OBS), layer by layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray.compression import pruning
from dfkd_ray.compression.moments import LAYERS, Arguments, Geometry, Moments

DAMPING = 0.01  # of the mean of the diagonal


class Watch(TorchFunctionMode):
    """While active, records the moments of each prunable layer's inputs at its first call."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.names = {id(weight): name for name, weight in pruning.prunable(network).items()}
        self.found: dict[str, tuple[Geometry, Moments]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func in LAYERS:
            call = Arguments.of(args, given)
            name = self.names.get(id(call.weight))
            if name is not None and name not in self.found:
                geometry = Geometry.of(func, call)
                if not geometry.too_large(call.input):
                    self.found[name] = geometry, geometry.moments(call.input, result, len(self.found)).uncentred()
        return result


@torch.no_grad()
def saliencies(network: nn.Module, images: Tensor, criterion: str) -> pruning.Weights:
    """`wanda`: w² E[x²]; `obs`: w² / [H⁻¹]_jj with H = E[x xᵀ], damped. Float64, by name, of every prunable weight.

    Sources: Sun et al. 2023, arXiv 2306.11695, equation 1 (squared here); Hassibi and Stork 1993, equation 5.
    Left out are layers with too many inputs, and those whose inputs are not seen: they do not run, or PyTorch runs them
    inside a function of several layers (`F.multi_head_attention_forward`). `images` are normalised; the network runs in
    eval mode.
    """
    network.eval()
    with Watch(network) as watch:
        network(images)
    scores = {}
    for name, weight in pruning.prunable(network).items():
        if name not in watch.found:
            continue
        geometry, moments = watch.found[name]
        diagonal = moments.gram.diagonal(dim1=1, dim2=2)
        if criterion == "obs":
            damping = (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
            factor = torch.linalg.cholesky(moments.gram + torch.diag_embed(damping.expand_as(diagonal)))
            diagonal = 1 / torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
        scores[name] = geometry.unrows(geometry.rows(weight.detach()).double().square() * diagonal[:, None], weight)
    return scores
