"""Layer-wise reconstruction: the kept weights of a pruned network by least squares, one layer after another.

For each convolution and linear layer, the student's kept weights are fitted to give the teacher's output on the
teacher's inputs, from the student's own inputs. Errors of earlier layers are so repaired by later ones. With the
student's input patches x, the teacher's outputs z, its weights w and the kept weights S of a row:

    w_S = (H_SS + r I)⁻¹ (c_S + r w_S),   H = cov(x), c = cov(x, z), r = ridge · mean(diag H)

Where a layer's output is the last summand of a residual sum, its target is the teacher's sum less what the student adds
to it. BatchNorm statistics are set on the way: a student's normalised output gets the mean and variance that its target
has on the same images. Both networks run in one forward pass, as the two halves of a batch, and each layer is fitted
when it runs: one pass over the images, whatever the depth.

With a `Selection`, the kept weights S are not those of the mask but as many, chosen by the same least squares.

Sources: least squares for a given mask from Hubara et al. 2021, arXiv 2102.08124; the damping from Frantar and Alistarh
2022, arXiv 2208.11580. The teacher's outputs on the teacher's inputs, the residual sums and the paired BatchNorm
statistics are this project's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray import batchnorm
from dfkd_ray.compression import pruning
from dfkd_ray.compression.least_squares import of_channels, solve, solve_together
from dfkd_ray.compression.moments import LAYERS, Arguments, Geometry
from dfkd_ray.compression.selection import Selection
from dfkd_ray.text import one_line

SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
SUMS |= {torch.Tensor.add_, torch.Tensor.__iadd__}
MEMORY = 2 << 30  # bytes of activations; images that do not fit are left out
LIVE = 4  # activations of the largest size that exist at once, in each half
MOST_OPERATIONS = 5e11  # of the factors of a layer's rows: half a minute or less of two slow cores; else it is left out
TOLERANCE = 0.01  # of the teacher's logits in the common pass, relative to the largest
SMALLEST_SCALE = 0.01  # of a BatchNorm channel, relative to the mean, through which a sum's error is passed back


@dataclass
class Call:
    """A layer's call in a forward pass: `skip` is the index of the operation that made the other summand."""

    index: int
    layer: str
    batch_norm: Any = None
    skip: int | None = None


@dataclass
class Plan:
    """What a first pass has found: the layers' calls by operation, and the bytes of an image's largest activation."""

    calls: dict[int, Call] = field(default_factory=dict)
    largest: int = 0

    def num_images(self, wanted: int) -> int:
        """How many of `wanted` images fit into `MEMORY`; at least 16."""
        return min(wanted, max(16, MEMORY // max(1, 2 * LIVE * self.largest)))


class Look(TorchFunctionMode):
    """Watches a forward pass: which layers are followed by BatchNorm, and which end a residual sum."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.layers = {id(weight): name for name, weight in pruning.prunable(network).items()}
        self.norms = {id(layer.running_mean): layer for layer in batchnorm.layers(network)}
        self.plan, self.index = Plan(), 0
        self.made: dict[int, tuple[int, Tensor, int]] = {}  # id of a tensor → operation, tensor, its version then
        self.ends: dict[int, Call] = {}  # id of a layer's output, after its BatchNorm if any → the call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        before = [(self.unchanged(each), self.ends.get(id(each))) for each in args[:2]]
        result = func(*args, **given)
        index, self.index = self.index, self.index + 1
        if not isinstance(result, Tensor):
            return result
        name = self.layers.get(id(Arguments.of(args, given).weight)) if func in LAYERS else None
        if name is not None:
            self.ends[id(result)] = self.plan.calls[index] = Call(index, name)
        elif func is F.batch_norm:
            self.batch_norm(result, args, given)
        elif func in SUMS and len(args) == 2 and not given:
            self.sum(args, before, result)
        self.made[id(result)] = (index, result, result._version)
        if result.ndim > 1:
            self.plan.largest = max(self.plan.largest, result[0].numel() * result.element_size())
        return result

    def unchanged(self, given: Any) -> int | None:
        """The operation that made a tensor, unless it was changed in place since then."""
        index, made, version = self.made.get(id(given), (None, None, None))
        return index if made is not None and made._version == version else None

    def batch_norm(self, result: Tensor, args: Any, given: Any) -> None:
        """A layer is followed by BatchNorm."""
        bound = batchnorm.BATCH_NORM.bind(*args, **given).arguments
        call, layer = self.ends.get(id(bound["input"])), self.norms.get(id(bound["running_mean"]))
        if call is not None and layer is not None:
            call.batch_norm = layer
            self.ends[id(result)] = call

    def sum(self, args: Any, before: Any, result: Tensor) -> None:
        """The layer whose summand was made last is fitted to the sum; the other summand must exist before it runs."""
        if not all(isinstance(each, Tensor) and each.shape == result.shape for each in args):
            return
        (left, left_call), (right, right_call) = before
        pairs = ((left_call, right), (right_call, left))
        ends = [(call, other) for call, other in pairs if call is not None and other is not None]
        if not ends:
            return
        call, other = max(ends, key=lambda end: end[0].index)
        if call.skip is None and other < call.index:
            call.skip = other


@torch.no_grad()
def look_at(network: nn.Module, images: Tensor) -> Plan:
    """The plan of a network (eval mode), from one forward pass."""
    with Look(network) as look:
        network(images)
    return look.plan


class Fit(TorchFunctionMode):
    """While active, a forward pass of the student on [images, images] fits each layer when it runs.

    The first half of every activation is the teacher's, the second half the student's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        masks: pruning.Masks,
        plan: Plan,
        ridge: float,
        batch: int,
        selection: Selection | None,
    ):
        super().__init__()
        self.batch, self.selection = batch, selection
        self.too_large: list[str] = []
        self.not_chosen: list[str] = []
        theirs = dict(teacher.named_parameters(remove_duplicate=False))
        self.masks, self.plan, self.ridge = dict(masks), plan, ridge
        self.shared = selection is None and bool(masks) and all(map(of_channels, masks.values()))
        self.weights = {id(weight): (name, theirs[name]) for name, weight in pruning.prunable(student).items()}
        self.biases = {id(bias): theirs[name] for name, bias in student.named_parameters() if bias.ndim == 1}
        twins = dict(teacher.named_modules(remove_duplicate=False))
        own = {layer: name for name, layer in student.named_modules()}
        self.norms: dict[int, tuple[Any, Any]] = {
            id(layer.running_mean): (layer, twins[own[layer]]) for layer in batchnorm.layers(student)
        }
        self.last_uses = {call.skip: index for index, call in plan.calls.items() if call.skip is not None}
        self.index = 0
        self.seen: set[str] = set()
        self.set_norms: set[int] = set()
        self.summands: dict[int, Tensor] = {}
        self.targets: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # id of an output → it, its target's mean, variance

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        index, self.index = self.index, self.index + 1
        if func in LAYERS:
            result = self.layer(index, func, args, given)
        elif func is F.batch_norm:
            result = self.batch_norm(args, given)
        else:
            result = func(*args, **given)
        if index in self.last_uses:
            self.summands[index] = result
        return result

    def layer(self, index: int, func: Any, args: Any, given: Any) -> Tensor:
        """Fit a layer at its first call, and run it: the teacher's weights on one half, the student's on the other."""
        call = Arguments.of(args, given)
        bias = call.bias
        if id(call.weight) not in self.weights or (bias is not None and id(bias) not in self.biases):
            return func(*args, **given)
        name, dense = self.weights[id(call.weight)]
        if len(call.input) % self.batch:
            raise ValueError(f"{name} has an input of {len(call.input):,} in a batch of {self.batch:,}")
        theirs, own = call.input.chunk(2)
        aim = func(theirs, dense, None if bias is None else self.biases[id(bias)], *call.rest, **call.named)
        planned = self.plan.calls.get(index)
        if planned is None or planned.layer != name:
            raise ValueError(f"{name} runs at another place than for two images")
        lacking = self.lacking(planned, aim)
        target = aim if lacking is None else aim + lacking
        if name not in self.seen:
            self.seen.add(name)
            self.fit(name, Geometry.of(func, call), call, dense, target, planned)
        result = torch.cat([aim, func(own, call.weight, bias, *call.rest, **call.named)])
        if lacking is not None and planned.batch_norm is not None:
            self.targets[id(result)] = (result, *batchnorm.channel_moments(target.float()))
        return result

    def lacking(self, planned: Call, aim: Tensor) -> Tensor | None:
        """What a layer's target adds to the teacher's output: what the student's other summand lacks."""
        if planned.skip is None or planned.skip not in self.summands:
            return None
        theirs, own = self.summands[planned.skip].chunk(2)
        if self.last_uses[planned.skip] == planned.index:
            del self.summands[planned.skip]
        if theirs.shape != aim.shape:
            return None
        lacking, layer = (theirs - own).float(), planned.batch_norm
        if layer is None:
            return lacking
        scale = (layer.running_var + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight
        usable = scale.abs() > SMALLEST_SCALE * scale.abs().mean()
        inverse = torch.where(usable, 1 / torch.where(usable, scale, 1.0), 0.0)
        return lacking * inverse.view(1, -1, *[1] * (aim.ndim - 2))

    def fit(self, name: str, geometry: Geometry, call: Arguments, dense: Tensor, target: Tensor, planned: Call) -> None:
        """Set a layer's weights and its bias; one that is too large is noted and left as it is."""
        rows, mask, own = geometry.rows(dense), self.masks.get(name), call.input.chunk(2)[1]
        kept = torch.ones_like(rows, dtype=torch.bool) if mask is None else geometry.rows(mask)
        operations = num_operations(kept.any(1, keepdim=True) if self.shared else kept)
        if geometry.too_large(own) or operations > MOST_OPERATIONS:
            self.too_large.append(name)
            return
        moments = geometry.moments(own, target, len(self.seen))
        if call.bias is None and planned.batch_norm is None:  # nothing here can add a constant
            moments = moments.uncentred()
        chosen = None
        if self.selection is not None and mask is not None:
            chosen = self.selection.choose(moments, rows.double(), kept, self.ridge, math.prod(geometry.kernel))
            if chosen is None:
                self.not_chosen.append(name)
            else:
                self.masks[name] = geometry.unrows(chosen[0], mask)
        if chosen is not None:
            solved = chosen[1]
        else:
            solved = (solve_together if self.shared else solve)(moments, rows.double(), kept, self.ridge)
        call.weight.copy_(geometry.unrows(solved.to(dense.dtype), dense))
        if call.bias is not None:
            offset = moments.target_mean - torch.einsum("goi,gi->go", solved, moments.mean)
            call.bias.copy_(offset.flatten())

    def batch_norm(self, args: Any, given: Any) -> Tensor:
        """Set a layer's statistics at its first call, and run it, with the teacher's on the first half."""
        bound = batchnorm.BATCH_NORM.bind(*args, **given)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        found = self.norms.get(id(arguments["running_mean"]))
        if found is None or arguments["training"]:
            return F.batch_norm(*args, **given)
        layer, teacher = found
        theirs, own = arguments["input"].chunk(2)
        known = self.targets.pop(id(arguments["input"]), None)
        if id(layer) not in self.set_norms:
            self.set_norms.add(id(layer))
            aim = known[1:] if known else batchnorm.channel_moments(theirs.float())
            measured = batchnorm.channel_moments(own.float())
            on_data = (teacher.running_mean, teacher.running_var)
            mean, spread = batchnorm.paired(measured, aim, on_data, layer.eps)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_((spread - layer.eps).clamp_min(0))
        statistics = {"running_mean": teacher.running_mean, "running_var": teacher.running_var}
        first = F.batch_norm(**{**arguments, **statistics, "input": theirs})
        return torch.cat([first, F.batch_norm(**{**arguments, "input": own})])


def num_operations(kept: Tensor) -> float:
    """Floating-point operations of the factors of all rows."""
    return float(kept.sum(2).double().pow(3).sum()) / 3


@dataclass(frozen=True)
class Done:
    """How many images a reconstruction has used, as memory allows, and the layers that were too large to be fitted.

    `not_chosen`: layers whose kept weights a selection could not choose. `masks`: those of the fitted student.
    """

    num_images: int
    too_large: tuple[str, ...] = ()
    not_chosen: tuple[str, ...] = ()
    masks: pruning.Masks = field(default_factory=dict, compare=False)


@torch.no_grad()
def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    images: Callable[[int], Tensor],
    num_images: int,
    masks: pruning.Masks,
    *,
    ridge: float = 0.01,
    selection: Selection | None = None,
) -> Done:
    """Fit the pruned `student`, a copy of `teacher`, in place; with a `selection`, other weights than the masks' stay.

    `images(n)` makes n normalised images on the student's device, in the layout that it takes. Both networks end in
    eval mode. `ValueError` if they cannot run as two halves of one batch, such as a network that computes a layer's
    weight anew in each pass; the student is then as before.
    """
    student.eval()
    teacher.eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    try:
        done = fitted(student, teacher, images, num_images, masks, ridge, selection)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        student.load_state_dict(before)
        raise ValueError(f"it does not run as one batch with its teacher: {one_line(str(error), 160)}") from error
    infinite = [name for name, tensor in student.state_dict().items() if not tensor.isfinite().all()]
    infinite = [name for name in infinite if before[name].isfinite().all()]
    if done is None or infinite:
        student.load_state_dict(before)
    if done is None:
        raise ValueError("its teacher's logits change when both run as one batch: its layers are not fitted")
    if infinite:
        raise ValueError(f"{infinite[0]} would not be finite")
    return done


def fitted(
    student: nn.Module,
    teacher: nn.Module,
    images: Callable[[int], Tensor],
    num_images: int,
    masks: pruning.Masks,
    ridge: float,
    selection: Selection | None,
) -> Done | None:
    """Fit the student; None if the teacher's logits change in the common pass."""
    some = images(2)
    # Autocast would go on with its first copy of each weight, made before the weight is fitted.
    with torch.autocast(some.device.type, enabled=False):
        plan = look_at(student, some)
        given = images(plan.num_images(num_images))
        expected = teacher(given[:16]).float()
        both = torch.cat([given, given])
        with Fit(student, teacher, masks, plan, ridge, len(both), selection) as fit:
            answer = student(both)  # nothing else: operations are counted from here, as in the plan
        found = answer[: len(expected)].float()
    close = torch.allclose(found, expected, rtol=0.0, atol=TOLERANCE * float(expected.abs().max()) + 1e-6)
    return Done(len(given), tuple(fit.too_large), tuple(fit.not_chosen), fit.masks) if fit.seen and close else None
