"""Which channels of a network must be removed together, found in one forward pass.

Each channel that a convolution or linear layer makes gets a label. A pass of one image carries the labels along: an
operation that only moves values (view, cat, permute, …) moves their labels in the same way; one that works value
by value joins the labels of its operands; a layer that reads channels notes which label each of its inputs has. Labels
that are joined are one channel, and are kept or removed as a whole: in a residual sum, a depthwise convolution, a gate.
An operation that is not known here, or that mixes channels (softmax, LayerNorm), fixes the channels that it reads.

The idea of a dependency graph is from Fang et al. 2023, arXiv 2301.12900 (DepGraph); labels in its place are this
project's: they follow shuffled, concatenated and zero-padded channels by themselves. Whether a removal is right is not
decided here: `channels` compares each kind of removal with the network.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode

from dfkd_ray import batchnorm
from dfkd_ray.compression import pruning
from dfkd_ray.compression.moments import LAYERS, Arguments, Geometry

Axis = tuple[str, str]  # the path of a module, and "out" or "in"
# Names of functions and of methods of tensors, without underscores.
# fmt: off
BY_VALUE = {
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "silu", "gelu", "elu", "selu",
    "celu", "leakyrelu", "softplus", "softsign", "mish", "logsigmoid", "threshold", "clamp", "clip", "clampmin",
    "clampmax", "minimum", "maximum", "abs", "exp", "sqrt", "rsqrt", "square", "neg", "pow", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "featuredropout", "alphadropout", "add", "iadd", "radd", "sub", "isub", "rsub", "mul",
    "imul", "rmul", "div", "truediv", "itruediv", "rtruediv", "clone", "contiguous", "detach",
}
# fmt: on
LIKE_FIRST = {"to", "float", "double", "typeas", "type"}
# fmt: off
MOVING = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes", "movedim", "squeeze",
    "unsqueeze", "chunk", "split", "tensorsplit", "narrow", "select", "getitem", "cat", "concat", "concatenate",
    "stack", "expand", "unbind", "roll", "flip", "repeat", "channelshuffle", "pixelshuffle", "pixelunshuffle",
}
OVER_SPACE = {
    "maxpool1d", "maxpool2d", "maxpool3d", "avgpool1d", "avgpool2d", "avgpool3d", "adaptiveavgpool1d",
    "adaptiveavgpool2d", "adaptiveavgpool3d", "adaptivemaxpool1d", "adaptivemaxpool2d", "adaptivemaxpool3d",
    "lppool1d", "lppool2d", "lppool3d", "interpolate",
}
# fmt: on
REDUCING = {"mean", "sum", "amax", "amin", "std", "var"}
FIXED = 0  # the label of values that no layer has made as channels: constants, padding, the image


@dataclass(frozen=True)
class Group:
    """Channels of the same axes. A unit is what is removed at once: its indices, as (axis, index)."""

    axes: tuple[Axis, ...]
    units: tuple[tuple[tuple[Axis, int], ...], ...]

    @property
    def name(self) -> str:
        """The first layer that makes its channels."""
        return next(path for path, dimension in self.axes if dimension == "out")


@dataclass(frozen=True)
class Found:
    """The groups of a network, in the order of its layers, and why the channels of other layers stay: path → reason."""

    groups: tuple[Group, ...]
    fixed: dict[str, str]


@torch.no_grad()
def find(network: nn.Module, image: Tensor) -> Found:
    """The groups of a network (eval mode) from one normalised image, (1, channels, height, width).

    A second pass is that of training, for heads that run there only: they read channels too.
    """
    copy = deepcopy(network)
    with Trace(copy) as trace:
        outputs = [copy(image)]
        for module in copy.modules():
            module.training = not isinstance(module, BatchNorm)
        with suppress(RuntimeError, TypeError, ValueError):  # as of a network that trains on several images only
            outputs.append(copy(image))
    for each in tensors_in(outputs):
        trace.fix(trace.labels_of(each), "is the output")
    return trace.found()


class Trace(TorchFunctionMode):
    """While active, follows the channels of a forward pass."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.paths: dict[int, str] = {}
        modules = dict(network.named_modules())
        for name, weight in pruning.prunable(network).items():
            self.paths[id(weight)] = name.rpartition(".")[0]
        for path, module in modules.items():
            if isinstance(module, BatchNorm | nn.PReLU) and isinstance(module.weight, nn.Parameter):
                self.paths[id(module.weight)] = path
            if isinstance(module, BatchNorm) and module.running_mean is not None:
                self.paths[id(module.running_mean)] = path
        self.parents = [FIXED]
        self.reasons: dict[int, str] = {FIXED: "meets values that are no channels"}
        self.labels: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor → it (so that it lives), its labels
        self.axes: dict[Axis, Tensor] = {}  # (channels,) labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        known = [labels for each in tensors_in([args, given]) if (labels := self.labels_of(each)) is not None]
        result = func(*args, **given)
        if not known and func not in LAYERS:
            return result
        try:
            after = self.after(func, args, given, result)
        except (LookupError, RuntimeError, TypeError, ValueError):  # a call of another form, as with names alone
            after = None
        if after is None and (any(True for _ in tensors_in(result)) or result is None):
            for labels in known:
                self.fix(labels, f"goes through {getattr(func, '__name__', 'an operation')}")
            for each in tensors_in(result):
                self.labels.pop(id(each), None)
        elif after is not None:
            for each, labels in zip(tensors_in(result), tensors_in(after), strict=True):
                self.labels[id(each)] = each, labels
        return result

    def labels_of(self, given: Any) -> Tensor | None:
        """A tensor's labels, of its own shape."""
        found = self.labels.get(id(given))
        return found[1] if found is not None and found[1].shape == given.shape else None

    def after(self, func: Any, args: Any, given: Any, result: Any) -> Any:
        """The labels of a result, of its structure; None where its channels cannot be told."""
        name = getattr(func, "__name__", "").replace("_", "").lower()
        if func in LAYERS:
            return self.layer(func, args, given, result)
        if func is F.batch_norm:
            bound = batchnorm.BATCH_NORM.bind(*args, **given).arguments
            own = [id(bound.get(name)) for name in ("weight", "running_mean")]
            path = next((self.paths[each] for each in own if each in self.paths), None)
            return self.per_channel(path, bound["input"])
        if func in (F.prelu, torch.prelu):
            path = self.paths.get(id(args[1] if len(args) > 1 else given["weight"]))
            alone = path is not None and len(args[1] if len(args) > 1 else given["weight"]) == 1
            return self.labels_of(args[0]) if alone else self.per_channel(path, args[0])
        if name in LIKE_FIRST:
            return self.labels_of(args[0])
        if name in BY_VALUE and isinstance(result, Tensor):
            return self.by_value(list(tensors_in([args, given])), result)
        if name == "pad":
            return self.padded(args, given, result)
        if name in OVER_SPACE and isinstance(result, Tensor):
            return self.over_space(args[0], result)
        if name in REDUCING and isinstance(result, Tensor):
            return self.reduced(args, given, result)
        if name in MOVING:
            return self.moved(func, args, given)
        return None

    def layer(self, func: Any, args: Any, given: Any, result: Tensor) -> Tensor | None:
        """A convolution or linear layer reads channels, and makes others."""
        call = Arguments.of(args, given)
        path, labels = self.paths.get(id(call.weight)), self.labels_of(call.input)
        axis = result.ndim - 1 if func is F.linear else 1
        if path is None or (func is not F.linear and call.input.ndim != call.weight.ndim):
            return None
        groups = Geometry.of(func, call).groups
        read = self.vector(labels, axis)
        num_in, num_out = call.input.shape[axis], result.shape[axis]
        if groups == num_in == num_out and groups > 1:
            made = self.noted((path, "out"), read, num_out)
        else:
            if read is not None and groups > 1 and groups == num_in:
                self.fix(read, f"is read by {path}, a layer with a group for each channel")
            self.tie(self.noted((path, "in"), read, num_in), groups)
            new = torch.arange(len(self.parents), len(self.parents) + num_out, dtype=torch.int32)
            self.parents += new.tolist()
            made = self.noted((path, "out"), new, num_out)
            self.tie(made, groups)
        return spread(made, axis, result)

    def noted(self, axis: Axis, labels: Tensor | None, num: int) -> Tensor:
        """Note the labels (channels,) of an axis; of one that was noted before, both are joined."""
        own = torch.full((num,), FIXED, dtype=torch.int32) if labels is None else labels
        if axis in self.axes:
            self.join(self.axes[axis], own)
        self.axes[axis] = own
        return own

    def tie(self, labels: Tensor, groups: int) -> None:
        """Join the channels at the same place of each group of a grouped convolution: each group loses as many."""
        if groups > 1:
            split = labels.view(groups, -1)
            self.join(split[:1].expand_as(split), split)

    def per_channel(self, path: str | None, x: Tensor) -> Tensor | None:
        """A layer with parameters for each channel, BatchNorm or PReLU, passes the channels on."""
        labels = self.vector(self.labels_of(x), 1)
        if path is None or labels is None:
            return None
        return spread(self.noted((path, "out"), labels, x.shape[1]), 1, x)

    def by_value(self, operands: list[Tensor], result: Tensor) -> Tensor | None:
        """Operands of the same place are one channel; a constant of one number meets none."""
        operands = [each for each in operands if each.numel() > 1 or self.labels_of(each) is not None]
        found = [self.labels_of(each) for each in operands]
        known = [labels.expand(result.shape) for labels in found if labels is not None]
        if len(known) < len(found):
            return None
        for other in known[1:]:
            self.join(known[0], other)
        return known[0]

    def padded(self, args: Any, given: Any, result: Tensor) -> Tensor | None:
        """Zeros around the image change no channel; zero channels beside others have no label."""
        x, sides = args[0], args[1] if len(args) > 1 else given["pad"]
        if len(sides) // 2 <= x.ndim - 2:
            return self.over_space(x, result)
        mode = args[2] if len(args) > 2 else given.get("mode", "constant")
        labels = self.labels_of(x)
        return F.pad(labels, sides, value=FIXED) if mode == "constant" and labels is not None else None

    def over_space(self, x: Tensor, result: Tensor) -> Tensor | None:
        """Pooling: each channel by itself."""
        labels = self.vector(self.labels_of(x), 1)
        return None if labels is None or result.shape[1] != len(labels) else spread(labels, 1, result)

    def reduced(self, args: Any, given: Any, result: Tensor) -> Tensor | None:
        """A mean over values of one channel is of that channel. What comes after the dimensions differs by function."""
        dims = args[1] if len(args) > 1 else given.get("dim", given.get("axis"))
        labels = self.labels_of(args[0])
        # One number may be no dimension: `x.std(False)` is of all values.
        if labels is None or isinstance(dims, bool) or not isinstance(dims, int | tuple | list) or dims in ((), []):
            return None
        keep = result.ndim == labels.ndim
        low, high = labels.amin(dims, keepdim=keep), labels.amax(dims, keepdim=keep)
        return low if torch.equal(low, high) else None

    def moved(self, func: Any, args: Any, given: Any) -> Any:
        """Labels are moved as the values were. None where channels are divided: those that stay would be divided
        at another place.
        """

        def instead(value: Any) -> Any:
            if isinstance(value, Tensor):
                labels = self.labels_of(value)
                return torch.full(value.shape, FIXED, dtype=torch.int32) if labels is None else labels.contiguous()
            return type(value)(map(instead, value)) if type(value) in (list, tuple) else value

        before = instead(args), {name: instead(value) for name, value in given.items()}
        try:
            result = func(*before[0], **before[1])
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        all_before = torch.cat([labels.flatten() for labels in tensors_in(list(before))]).unique()
        after = []
        for labels in tensors_in(result):
            axes = [each for each in range(labels.ndim) if (labels != labels.narrow(each, 0, 1)).any()]
            if len(axes) > 1 or not torch.equal(labels.unique(), all_before):
                return None
            axis = axes[0] if axes else 0
            after.append(spread(labels.movedim(axis, 0).flatten(1)[:, 0], axis, labels))
        return after

    def vector(self, labels: Tensor | None, axis: int) -> Tensor | None:
        """The labels along one axis (channels,), if they are the same at every place; else they are fixed."""
        if labels is None:
            return None
        flat = compact(labels, axis).movedim(axis, 0).flatten(1)
        if (flat != flat[:, :1]).any():
            self.fix(labels, "mixes channels with places")
            return None
        return flat[:, 0]

    def fix(self, labels: Tensor | None, reason: str) -> None:
        """Channels with these labels stay."""
        if labels is not None:
            for label in compact(labels).unique().tolist():
                self.reasons.setdefault(label, reason)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Make labels of the same place one channel."""
        shape = torch.broadcast_shapes(compact(first).shape, compact(second).shape)
        pairs = torch.stack([compact(each).expand(shape).flatten() for each in (first, second)], 1)
        for one, other in pairs.unique(dim=0).tolist():
            roots = sorted((self.root(one), self.root(other)))
            self.parents[roots[1]] = roots[0]

    def root(self, label: int) -> int:
        """The label that stands for all that were joined with this one."""
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return label

    def found(self) -> Found:
        """The groups of what may be removed."""
        reasons: dict[int, str] = {}
        for label, reason in self.reasons.items():
            reasons.setdefault(self.root(label), reason)
        units: dict[int, list[tuple[Axis, int]]] = defaultdict(list)
        fixed: dict[str, str] = {}
        for axis, labels in self.axes.items():
            roots = [self.root(label) for label in labels.tolist()]
            for index, root in enumerate(roots):
                if root not in reasons:
                    units[root].append((axis, index))
            if axis[1] == "out" and all(root in reasons for root in roots):
                fixed[axis[0]] = reasons[roots[0]]
        groups: dict[tuple[Axis, ...], list[tuple[tuple[Axis, int], ...]]] = defaultdict(list)
        for unit in units.values():
            groups[tuple(dict.fromkeys(axis for axis, _ in unit))].append(tuple(unit))
        return Found(tuple(Group(axes, tuple(own)) for axes, own in groups.items()), fixed)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def spread(labels: Tensor, axis: int, like: Tensor) -> Tensor:
    """Labels (channels,) at every place of a tensor, without memory of their own."""
    return labels.view([-1 if each == axis else 1 for each in range(like.ndim)]).expand(like.shape)


def compact(labels: Tensor, axis: int | None = None) -> Tensor:
    """The labels without the repetitions of `spread`; `axis` is left as it is."""
    for each, stride in enumerate(labels.stride()):
        if stride == 0 and each != axis:
            labels = labels.narrow(each, 0, min(1, labels.shape[each]))
    return labels
