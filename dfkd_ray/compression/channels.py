"""Structured pruning: whole channels are removed, so that the network is smaller and has fewer multiplications.

`prepare` finds which channels can be removed (`dependencies`). `choose` ranks them, and removes the lowest until the
wanted share of parameters or multiplications is gone. Groups of layers of the same kinds are ranked together, each kind
loses the same share of its channels (isomorphic ranking: Fang et al. 2024, arXiv 2407.04616).

A removed channel is masked first: its weights are zero, and so are the weights that read it. Then it contributes
nothing, whatever its activation makes of zero, and the network of the old shape equals the small one. Layer-wise
reconstruction runs on it (`layerwise`) and so compensates for what is missing: the weights that read other channels are
fitted to the teacher's outputs. `sliced` then makes the small network.

Every kind of removal is compared with the network beforehand; what does not come out equal is not removed.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from dfkd_ray.compression import dependencies, operations, pruning, shape_edits
from dfkd_ray.compression.channel_scores import SCORES
from dfkd_ray.compression.dependencies import Axis, Group
from dfkd_ray.config import PruningConfig
from dfkd_ray.description import ShapeEdit
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import reason

LEAST_KEPT = 0.1  # of a group's channels
TOLERANCE = 0.02  # between the wanted share and the one achieved; beyond it the row has a warning
CLOSE = 0.01  # of the logits of masked and sliced network, relative to the largest; a wrong slice is far beyond it
NUM_TRIED = 4  # images in that comparison
PROBES = ((1, 0), (3, 0), (1, 3), (1, -3), (0, 0))  # (scale, shift) of the images on which a branch is looked for
STEPS = 24  # of the bisection: its last step is less than a channel
MEASURED_STEPS = 6  # of it where each step is measured
MEASURED_TOLERANCE = 0.05  # in the place of `TOLERANCE` there
WHAT = {"parameters": "parameters", "macs": "multiplications", "latency": "seconds"}  # that a target is a share of
Removed = Mapping[int, Sequence[int]]  # group → units


@dataclass(frozen=True)
class Prepared:
    """What can be removed from a network, what stays and why (path → reason), and MACs by the names of weights."""

    groups: tuple[Group, ...]
    left_out: dict[str, str]
    macs: Counter[str]


@dataclass(frozen=True)
class Choice:
    """What is removed: `share` of the target, with the `ratio` of units; `widths` of layers: path → (kept, of)."""

    edits: tuple[ShapeEdit, ...]
    masks: pruning.Masks
    share: float
    ratio: float
    widths: dict[str, tuple[int, int]]
    warnings: tuple[str, ...] = ()


def prepare(network: nn.Module, image_shape: Sequence[int], importance: str = "magnitude") -> Prepared:
    """Find what can be removed from a network, which ends in eval mode.

    `image_shape`: (channels, height, width). `ValueError` if nothing can be.
    """
    network.eval()
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_TRIED, *image_shape, generator=generator).to(device)
    refuse_branches(network, images)
    found = dependencies.find(network, images[:1])
    left_out = dict(found.fixed)
    groups = []
    modules = dict(network.named_modules())
    for group in found.groups:
        if len(group.units) < 2:
            left_out.setdefault(group.name, "its channels are removed all together, or not at all")
        elif importance == "batchnorm_scale" and not any(
            isinstance(modules[path], BatchNorm) for path, _ in group.axes
        ):
            left_out.setdefault(group.name, "no BatchNorm has its channels")
        else:
            groups.append(group)
    if difference(network, groups, images) is not None:
        tried = [(group, difference(network, [group], images)) for group in groups]
        left_out |= {group.name: problem for group, problem in tried if problem is not None}
        groups = [group for group, problem in tried if problem is None]
        problem = difference(network, groups, images) if groups else None
        if problem is not None:
            raise ValueError(
                f"pruning.structure=channels: removing channels of several layers of this network {problem}"
            )
    if not groups:
        why = "; ".join(f"{one_line(path, 40)} {text}" for path, text in list(left_out.items())[:2])
        raise ValueError(
            f"pruning.structure=channels: no channel of this network can be removed ({one_line(why, 200)})"
        )
    return Prepared(tuple(groups), left_out, operations.macs(network, images[:1]))


@torch.no_grad()
def refuse_branches(network: nn.Module, images: Tensor) -> None:
    """`ValueError` for a network in which it depends on the images which layers run.

    What a layer reads is found in one pass: a layer that did not run in it would be left as it is, and not fit.
    """
    probes = [image[None] * scale + shift for image in images for scale, shift in PROBES]
    ran = [frozenset(operations.macs(network, probe)) for probe in probes]
    sometimes = sorted(frozenset.union(*ran) - frozenset.intersection(*ran))
    if sometimes:
        named = one_line(", ".join(name.rpartition(".")[0] for name in sometimes), 120)
        raise ValueError(
            f"pruning.structure=channels: it depends on the image whether {named} of this network run, so what they "
            "read cannot be told; use pruning.structure=unstructured"
        )


def difference(network: nn.Module, groups: Sequence[Group], images: Tensor) -> str | None:
    """Why the network without some channels of these groups is not the one in which they are masked; None if it is."""
    generator = torch.Generator().manual_seed(1)
    removed = {}
    for index, group in enumerate(groups):
        num = max(1, len(group.units) // 3)
        removed[index] = torch.randperm(len(group.units), generator=generator)[:num].tolist()
    edits = edits_of(network, groups, removed)
    try:
        masked, small = deepcopy(network), sliced(network, edits)
        pruning.apply(masked, masks_of(network, edits))
        check_equal(masked, small, images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - the network's code may raise anything, often an assertion on a shape
        return one_line(f"changes what it computes, or it does not run ({reason(error, 100)})", 140)
    return None


@torch.no_grad()
def check_equal(masked: nn.Module, small: nn.Module, images: Tensor) -> None:
    """`ValueError` unless a network with masked channels gives the logits of the one without them, to rounding."""
    expected, found = masked(images).float(), small(images).float()
    if found.shape != expected.shape:
        raise ValueError(f"logits of {tuple(found.shape)} in the place of {tuple(expected.shape)}")
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= CLOSE:
        raise ValueError(f"logits differ by {error:.2g} of the largest")


def choose(
    network: nn.Module,
    prepared: Prepared,
    config: PruningConfig,
    images: Tensor | None = None,
    removed_seconds: Callable[[nn.Module], float] | None = None,
    ratio: float | None = None,
) -> Choice:
    """Choose the channels to remove; the network is not changed. `images`: normalised, for `importance=activations`.

    `removed_seconds`: for `target=latency`, the share of the seconds that a smaller network saves. It is measured in
    each step of a bisection, which finds the ratio of removed units. `ratio`: the one of an earlier choice, which is
    not searched again. `ValueError` if the wanted share cannot be removed.
    """
    groups = prepared.groups
    ranking = Ranking.of(network, groups, SCORES[config.importance](network, groups, images), config.round_to)
    sizes = Sizes.of(network, groups, None if config.target == "parameters" else prepared.macs)
    measured = config.target == "latency"

    @functools.cache
    def share(ratio: float) -> float:
        chosen = ranking.lowest(ratio)
        if removed_seconds is None or not measured:
            return 1 - sizes.after(chosen) / sizes.total
        return removed_seconds(sliced(network, edits_of(network, groups, chosen)))

    tolerance, what = MEASURED_TOLERANCE if measured else TOLERANCE, WHAT[config.target]
    if ratio is None:
        ratio = nearest(share, config.sparsity, MEASURED_STEPS if measured else STEPS, tolerance, what)
    chosen, achieved = ranking.lowest(ratio), share(ratio)
    edits = edits_of(network, groups, chosen)
    if not edits:
        raise ValueError(
            f"pruning.sparsity={config.sparsity:g} removes no channel: a step is more than that of the {what}"
        )
    warnings = []
    if abs(achieved - config.sparsity) > tolerance:
        warnings.append(
            f"{achieved:.1%} of the {what} are removed in the place of {config.sparsity:.1%}: channels go in steps of "
            f"pruning.round_to={config.round_to}"
        )
    if prepared.left_out:
        named = "; ".join(f"{path} ({text})" for path, text in prepared.left_out.items() if text != "is the output")
        if named:
            warnings.append(f"channels that stay: {one_line(named, 300)}")
    modules = dict(network.named_modules())
    kept = {edit.module: len(edit.kept) for edit in edits if edit.dimension == "out"}
    layers = {path: shape_edits.dimensions(modules[path])["out"].size for path in kept if is_layer(modules[path])}
    sizes_kept = {path: (kept[path], size) for path, size in layers.items()}
    return Choice(edits, masks_of(network, edits), achieved, ratio, sizes_kept, tuple(warnings))


def nearest(share: Callable[[float], float], wanted: float, num_steps: int, tolerance: float, what: str) -> float:
    """The ratio of units whose removal saves nearest to the wanted share, which grows with it.

    `ValueError` if even the largest ratio saves less.
    """
    most = share(1.0)
    if most < wanted - tolerance:
        raise ValueError(
            f"pruning.sparsity={wanted:g}: at most {most:.1%} of the {what} can be removed by channels; lower "
            "it, or pruning.round_to"
        )
    low, high = 0.0, 1.0
    for _ in range(num_steps):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) >= wanted else (middle, high)
    return min((low, high), key=lambda each: abs(share(each) - wanted))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer."""
    return isinstance(module, pruning.KINDS)


@dataclass(frozen=True)
class Ranking:
    """Units from the lowest score to the highest: of each group, and of the groups of each kind together."""

    own: list[list[int]]  # of each group: its units
    kinds: list[list[int]]  # of each kind: the groups of its units, a number for each unit
    steps: list[int]  # of each group: units that go together by rounding

    @classmethod
    def of(cls, network: nn.Module, groups: Sequence[Group], scores: Sequence[Tensor], round_to: int) -> "Ranking":
        """Groups are of one kind if their layers are."""
        modules = dict(network.named_modules())
        members: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            members[tuple(sorted((type(modules[path]).__name__, side) for path, side in group.axes))].append(index)
        kinds = []
        for own in members.values():
            of = torch.cat([torch.full((len(scores[index]),), index) for index in own])
            kinds.append(of[torch.argsort(torch.cat([scores[index] for index in own]), stable=True)].tolist())
        # A unit has `width` channels of the layer that makes them.
        widths = [sum(axis == (group.name, "out") for axis, _ in group.units[0]) for group in groups]
        steps = [round_to // math.gcd(round_to, width) for width in widths]
        return cls([torch.argsort(own, stable=True).tolist() for own in scores], kinds, steps)

    def lowest(self, ratio: float) -> dict[int, list[int]]:
        """The units to remove: of each kind the `ratio` lowest, but never a whole group; what stays is rounded."""
        removed: dict[int, list[int]] = {}
        for kind in self.kinds:
            gone = Counter(kind[: round(ratio * len(kind))])
            for index in sorted(gone):
                num, step = len(self.own[index]), self.steps[index]
                least = min(num, -(-max(1, math.ceil(LEAST_KEPT * num)) // step) * step)
                kept = min(num, max(least, round((num - gone[index]) / step) * step))
                if kept < num:
                    removed[index] = self.own[index][: num - kept]
        return removed


@dataclass(frozen=True)
class Sizes:
    """Parameters, or MACs, of the layers that lose channels: each is proportional to the channels of its axes."""

    groups: Sequence[Group]
    total: float
    layers: dict[str, tuple[float, float]]  # path → what is proportional to out · in, and to out alone
    axes: dict[Axis, int]  # channels
    same: list[Counter[Axis] | None]  # of each group: the channels of a unit, if they are as many in each unit

    @classmethod
    def of(cls, network: nn.Module, groups: Sequence[Group], macs: Mapping[str, int] | None) -> "Sizes":
        """The sizes of a network: MACs by the names of weights, or None for parameters."""
        modules = dict(network.named_modules())
        axes, layers = {}, {}
        for path, dimension in dict.fromkeys(axis for group in groups for axis in group.axes):
            module: Any = modules[path]
            axes[path, dimension] = shape_edits.dimensions(module)[dimension].size
            both = 0 if not is_layer(module) else module.weight.numel()
            rest = sum(own.numel() for own in module.parameters(recurse=False)) - both
            if macs is not None:
                both, rest = macs[f"{path}.weight" if path else "weight"], 0
            layers[path] = float(both), float(rest)
        total = pruning.num_parameters(network) if macs is None else sum(macs.values())
        counts = [[Counter(axis for axis, _ in unit) for unit in group.units] for group in groups]
        same = [own[0] if all(each == own[0] for each in own) else None for own in counts]
        return cls(groups, float(total), layers, axes, same)

    def after(self, removed: Removed) -> float:
        """The size without these units."""
        lost: Counter[Axis] = Counter()
        for index, units in removed.items():
            same = self.same[index]
            for unit in units if same is None else ():
                lost.update(axis for axis, _ in self.groups[index].units[unit])
            for axis, num in (same or {}).items():
                lost[axis] += num * len(units)
        size = self.total
        for path in dict.fromkeys(path for path, _ in lost):
            both, rest = self.layers[path]
            out, into = (1 - lost[path, name] / self.axes.get((path, name), 1) for name in ("out", "in"))
            size -= both * (1 - out * into) + rest * (1 - out)
        return size


def edits_of(network: nn.Module, groups: Sequence[Group], removed: Removed) -> tuple[ShapeEdit, ...]:
    """The edits that remove these units, in the order of the network's layers."""
    lost: dict[Axis, set[int]] = defaultdict(set)
    for index, units in removed.items():
        for unit in units:
            for axis, channel in groups[index].units[unit]:
                lost[axis].add(channel)
    edits = []
    for path, module in network.named_modules():
        for dimension in ("out", "in"):
            gone = lost.get((path, dimension))
            if gone:
                size = shape_edits.dimensions(module)[dimension].size
                kept = tuple(channel for channel in range(size) if channel not in gone)
                edits.append(ShapeEdit(module=path, dimension=dimension, kept=kept))
    return tuple(edits)


def masks_of(network: nn.Module, edits: Sequence[ShapeEdit]) -> pruning.Masks:
    """The masks of all Conv and Linear weights of the old shape: True for what the edits keep."""
    numbered = deepcopy(network)
    for weight in pruning.prunable(numbered).values():
        weight.data = torch.arange(weight.numel(), dtype=torch.float64, device=weight.device).view_as(weight)
    shape_edits.replay(numbered, edits)
    masks = {}
    kept = pruning.prunable(numbered)
    for name, weight in pruning.prunable(network).items():
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[kept[name].detach().flatten().long()] = True
        masks[name] = mask.view_as(weight)
    return masks


def sliced(network: nn.Module, edits: Sequence[ShapeEdit], state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of a network, with the weights of `state` if given, that has only the channels that the edits keep."""
    copy = deepcopy(network)
    if state is not None:
        copy.load_state_dict(state)
    return shape_edits.replay(copy, edits)
