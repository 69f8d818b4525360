"""BatchNorm of a student in training, paired with its teacher's.

Plain training normalises with the statistics of a batch of synthetic images, and the student ends with their average.
On data they are others. How much they differ the teacher says: it has the running statistics of its data, and gives
its statistics on the same batch. Per channel, with the student's mean m and variance v on a batch, the teacher's m_t
and v_t there, and its running m_d and v_d,

    r = √((v + ε) / (v_t + ε)),   mean = m + (m_d − m_t) r,   variance + ε = (v_d + ε) r²

are what the student's channel would have on the data if it followed the teacher's. The student is normalised with
these, in gradients too, and its running statistics follow them. A student that equals its teacher then computes what
the teacher computes in eval mode, on any images. Layer-wise reconstruction sets the statistics by the same rule
(`batchnorm.paired`), so training goes on from where it ends.

Measured on 5,000 validation images, one start each, 300 steps, points lost with batch statistics and paired. Channels
removed: ResNet-18 1.5 and 1.2, ResNet-20 3.0 and 2.7, VGG-19-BN x0.25 1.7 and 1.2 (by activations), 5.3 and 5.1 (by
magnitude). On a MobileNetV2 x0.5 training costs 0.7 points without it and 0.8 with it. Single weights removed: no clear
gain (`sweeps/RESULTS.md`), so these are trained with batch statistics. This rule is this project's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray import batchnorm


class Pairs(TorchFunctionMode):
    """While active, normalises a student in train mode with paired statistics.

    `seen`: the teacher's statistics of the pass on the same images, just before. `kept`: layer → the teacher's channels
    that the student has, of layers that have lost some.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, seen: batchnorm.Statistics, kept: Mapping[str, tuple[int, ...]]
    ):
        super().__init__()
        self.seen, self.calls = seen, Counter[int]()
        own = dict(student.named_modules(remove_duplicate=False))
        device = next(student.parameters()).device
        # The id of a student's running mean → the teacher's layer, and its channels that the student has.
        self.twins: dict[int, tuple[nn.Module, Tensor | slice]] = {}
        known = set[nn.Module](batchnorm.layers(teacher))
        for name, layer in teacher.named_modules(remove_duplicate=False):
            twin = own.get(name)
            if not (layer in known and isinstance(twin, batchnorm.BatchNorm)):
                continue
            # A layer may have several names, of which `kept` knows one.
            if name in kept or id(twin.running_mean) not in self.twins:
                channels = torch.tensor(kept[name], device=device) if name in kept else slice(None)
                self.twins[id(twin.running_mean)] = (layer, channels)

    def __enter__(self) -> "Pairs":
        self.calls.clear()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **given)
        bound = batchnorm.BATCH_NORM.bind(*args, **given)
        bound.apply_defaults()
        twin, kept = self.twins.get(id(bound.arguments["running_mean"]), (None, slice(None)))
        passes = [i for i, layer in enumerate(self.seen.layers) if layer is twin]
        if not passes or not bound.arguments["training"]:
            return func(*args, **given)
        number = passes[min(self.calls[id(twin)], len(passes) - 1)]  # a layer may run several times
        self.calls[id(twin)] += 1
        layer = self.seen.layers[number]
        assert layer.running_mean is not None and layer.running_var is not None
        theirs = (self.seen.means[number][kept], self.seen.variances[number][kept])
        return normalised(bound.arguments, theirs, (layer.running_mean[kept], layer.running_var[kept]))


def normalised(given: Mapping[str, Any], theirs: batchnorm.Pair, on_data: batchnorm.Pair) -> Tensor:
    """`F.batch_norm` in train mode, whose arguments are `given`, with paired statistics.

    `theirs`, `on_data`: the teacher's mean and variance on the same batch, and its running ones, each (channels,).
    """
    images, eps = given["input"], given["eps"]
    mean, spread = batchnorm.paired(batchnorm.moments(images), theirs, on_data, eps)
    with torch.no_grad():
        for running, now in ((given["running_mean"], mean), (given["running_var"], (spread - eps).clamp_min(0))):
            running.lerp_(now.to(running.dtype), given["momentum"])
    scale = spread.rsqrt() if given["weight"] is None else given["weight"] * spread.rsqrt()
    shift = -mean * scale if given["bias"] is None else given["bias"] - mean * scale
    return batchnorm.channel_affine(images, scale, shift)


@contextmanager
def paired(
    student: nn.Module, teacher: nn.Module, kept: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[Pairs]:
    """Yields the mode for the student's passes; while open, each pass of the teacher (eval mode) is recorded.

    Before each pass of the teacher, clear `seen`. `ValueError` for a teacher without BatchNorm statistics.
    """
    with batchnorm.recorded(teacher) as seen:
        yield Pairs(student, teacher, seen, kept or {})
