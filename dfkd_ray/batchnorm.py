"""BatchNorm statistics: differentiable input statistics of a teacher in eval mode, and re-estimation for a student.

The gradient of any function of a layer's (mean, var) with respect to its input x is affine per channel: a_c + b_c x. So
an eval-mode BatchNorm and its input statistics are one autograd function with a closed-form backward. It needs no graph
of reductions, and one pass over memory instead of the several passes of hooks. On CPU the per-channel affine maps of
the backward run in the BatchNorm kernel itself (mean 0, variance 1), about 1.6 times faster than broadcast arithmetic
in bfloat16.

Only PyTorch's own `forward` is replaced. A subclass may do more than BatchNorm (its activation, its drop path): its own
`forward` runs, and the call of `F.batch_norm` in it is replaced.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode

PLAIN = (BatchNorm.forward, nn.SyncBatchNorm.forward)  # in eval mode these compute BatchNorm and nothing else
# Of the logits with and without recording, relative to the largest. A layer left out changes them by 0.3 and more.
TOLERANCE = 0.01
BATCH_NORM = signature(F.batch_norm)
Pair = tuple[Tensor, Tensor]  # mean and variance per channel


@dataclass
class Statistics:
    """Per BatchNorm layer, in the order they ran: float32 mean and biased variance of the input, each (channels,)."""

    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    layers: list[BatchNorm] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.means.clear()
        self.variances.clear()
        self.layers.clear()


def layers(network: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers that hold running statistics."""
    found = [module for module in network.modules() if isinstance(module, BatchNorm)]
    return [layer for layer in found if layer.running_mean is not None]


def size_of_statistics(network: nn.Module) -> float:
    """The norms of running means and variances, summed over the layers: `losses.batchnorm_distance` of zeros.

    So it grows with a network's depth, widths and scale as the distance does.
    """
    statistics = (each for layer in layers(network) for each in (layer.running_mean, layer.running_var))
    return float(sum(each.double().norm() for each in statistics if each is not None))


def is_initial(layer: BatchNorm) -> bool:
    """Whether a layer's running statistics are those of a new layer."""
    mean, variance = layer.running_mean, layer.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())


def require_layers(network: nn.Module) -> list[BatchNorm]:
    """`layers`, or `ValueError` for a network without BatchNorm statistics."""
    found = layers(network)
    if not found:
        raise ValueError(
            "the teacher has no BatchNorm layer with running statistics: DeepInversion has nothing to match; "
            "such a network needs activation records released with it"
        )
    return found


def channel_moments(x: Float[Tensor, "n c *rest"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Float32 mean and biased variance per channel, whatever the precision of `x`."""
    channels = x.shape[1]
    if x.device.type == "cpu":
        # The kernel is vectorised, in two passes with float32 accumulation; with momentum 0 the buffers stay unchanged.
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        zeros, ones = torch.zeros(channels, dtype=kind), torch.ones(channels, dtype=kind)
        return torch.batch_norm_update_stats(x, zeros, ones, 0.0)
    variance, mean = torch.var_mean(x.float(), dim=[0, *range(2, x.ndim)], correction=0)
    return mean, variance


def moments(x: Float[Tensor, "n c *rest"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """`channel_moments`, differentiable in x."""
    return _Moments.apply(x)  # type: ignore[return-value]


def paired(own: Pair, theirs: Pair, on_data: Pair, eps: float) -> Pair:
    """A student's mean on the data, and its variance there plus `eps`, if it follows its teacher from batch to data.

    Means and variances per channel: the student's on the batch, the teacher's there, and the teacher's on its data.
    """
    ratio = ((own[1] + eps) / (theirs[1] + eps)).sqrt()
    return own[0] + (on_data[0] - theirs[0]) * ratio, (on_data[1] + eps) * ratio.square()


def channel_affine(
    x: Float[Tensor, "n c *rest"], scale: Float[Tensor, " c"], shift: Float[Tensor, " c"]
) -> Float[Tensor, "n c *rest"]:
    """scale_c x + shift_c with float32 coefficients, in the precision of `x`."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zeros, ones, False, 0.0, 0.0)[0]


class _EvalBatchNorm(torch.autograd.Function):
    """y = scale x + shift, and the mean and variance of x. Only x gets a gradient: a teacher is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = channel_moments(x)
        ctx.save_for_backward(x, scale, mean)
        return channel_affine(x, scale, shift), mean, variance

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor
    ) -> tuple[Tensor, None, None]:
        x, scale, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = 2.0 / count * grad_variance
        offset = grad_mean / count - slope * mean
        grad = channel_affine(grad_y, scale, offset)
        return grad.add_(channel_affine(x, slope, torch.zeros_like(slope))), None, None


class _Moments(torch.autograd.Function):
    """`channel_moments`, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = channel_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = 2.0 / count * grad_variance
        return channel_affine(x, slope, grad_mean / count - slope * mean)


def fused(
    x: Float[Tensor, "n c *rest"], layer: BatchNorm
) -> tuple[Float[Tensor, "n c *rest"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Eval-mode `layer(x)`, and mean and biased variance of x, differentiable in x."""
    assert layer.running_mean is not None and layer.running_var is not None
    return fused_call(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def fused_call(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    _training: bool = False,
    _momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`F.batch_norm` with these arguments in eval mode, and mean and biased variance of x, differentiable in x."""
    scale = (running_var + eps).rsqrt()
    shift = -running_mean * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    return _EvalBatchNorm.apply(x, scale, shift)  # type: ignore[return-value]


class _Inside(TorchFunctionMode):
    """While active, records and replaces the calls of `F.batch_norm` with one layer's statistics in eval mode."""

    def __init__(self, layer: BatchNorm, note: Callable[[BatchNorm, Tensor, Tensor], None]):
        super().__init__()
        self.layer, self.note, self.num_calls = layer, note, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        bound = BATCH_NORM.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        if given["running_mean"] is not self.layer.running_mean or given["training"]:
            return func(*args, **(kwargs or {}))
        y, mean, variance = fused_call(*bound.args)
        self.note(self.layer, mean, variance)
        self.num_calls += 1
        return y


@contextmanager
def recorded(network: nn.Module) -> Iterator[Statistics]:
    """While open, each forward pass of `network` (eval mode) appends its layers' input statistics.

    A layer whose own `forward` does not call `F.batch_norm` has the statistics of its first argument recorded. Clear
    the statistics before each pass. `ValueError` for a network without BatchNorm statistics.
    """
    found = require_layers(network)
    assert not network.training, "statistics are matched against a frozen teacher in eval mode"
    statistics = Statistics()

    def note(layer: BatchNorm, mean: Tensor, variance: Tensor) -> None:
        statistics.means.append(mean)
        statistics.variances.append(variance)
        statistics.layers.append(layer)

    def forward(layer: BatchNorm, x: Tensor) -> Tensor:
        y, mean, variance = fused(x, layer)
        note(layer, mean, variance)
        return y

    def around(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(layer: BatchNorm, x: Tensor, *args: Any, **named: Any) -> Any:
            with _Inside(layer, note) as inside:
                y = own(x, *args, **named)
            if not inside.num_calls:
                note(layer, *moments(x))
            return y

        return forward

    replaced = [layer for layer in found if "forward" in vars(layer)]
    before = [vars(layer)["forward"] for layer in replaced]
    for layer in found:
        is_plain = type(layer).forward in PLAIN and "forward" not in vars(layer)
        own = forward if is_plain else around(layer.forward)
        layer.forward = MethodType(own, layer)  # type: ignore[method-assign]
    try:
        yield statistics
    finally:
        for layer in found:
            del layer.forward
        for layer, own in zip(replaced, before, strict=True):
            layer.forward = own  # type: ignore[method-assign]


CHECKED: WeakSet[nn.Module] = WeakSet()  # the networks that `check_recording` has compared in this process


@torch.no_grad()
def check_recording(network: nn.Module, image_shape: Sequence[int]) -> None:
    """`ValueError` for a network without BatchNorm statistics, or whose logits `recorded` changes (eval mode).

    They are compared once, on two images of noise. Images would be made for another network than was handed in.
    """
    require_layers(network)
    if network in CHECKED:
        return
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(network.parameters()).device)
    expected = network(images).float()
    with recorded(network) as statistics:
        seen = network(images).float()
    if not statistics.layers:
        raise ValueError("none of its BatchNorm layers runs in a forward pass: DeepInversion has nothing to match")
    scale = float(expected.abs().max().nan_to_num(0.0, 0.0, 0.0))
    if not torch.allclose(seen, expected, rtol=0.0, atol=TOLERANCE * scale + 1e-6, equal_nan=True):
        kinds = sorted({type(layer).__name__ for layer in layers(network) if type(layer).forward not in PLAIN})
        raise ValueError(
            f"its logits change by {float((seen - expected).abs().max()):.3g} (they are up to {scale:.3g}) while the "
            f"inputs of its BatchNorm layers are recorded{': ' + ', '.join(kinds) if kinds else ''}; images would be "
            "made for another network; spell these layers as PyTorch's BatchNorm and what follows it"
        )
    CHECKED.add(network)


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every BatchNorm layer's running statistics to the average over `batches` of normalised images.

    The mean over batches of mean and unbiased variance, each batch with equal weight; all other modules stay in
    eval mode. A layer that does not update its statistics (it is frozen by its own code, or does not run) keeps them.
    The network ends in eval mode. `ValueError` without a batch.
    """
    network.eval()
    found = layers(network)
    momenta = [layer.momentum for layer in found]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in found]
    calls: Counter[nn.Module] = Counter()

    def average(layer: nn.Module, _given: Any) -> None:
        """A cumulative average, as PyTorch's `momentum=None`, which not every subclass takes."""
        assert isinstance(layer, BatchNorm)
        calls[layer] += 1
        layer.momentum = 1.0 / calls[layer]

    handles = [layer.register_forward_pre_hook(average) for layer in found]
    for layer in found:
        layer.reset_running_stats()
        layer.train()
    count = 0
    try:
        for images in batches:
            network(images)
            count += 1
    finally:
        for layer, momentum, handle, buffers in zip(found, momenta, handles, before, strict=True):
            handle.remove()
            layer.momentum = momentum
            layer.eval()
            if is_initial(layer):
                for name, buffer in buffers.items():
                    layer.get_buffer(name).copy_(buffer)
    if count == 0:
        raise ValueError("BatchNorm re-estimation got no batch of images")
