"""Structured pruning: what can be removed, that the small network is the masked one, that bundles keep its shape."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import dfkd_ray
from dfkd_ray import bundles, exporting, latency, models, sweep, trial, untrusted
from dfkd_ray.cli import names
from dfkd_ray.compression import channels, dependencies, layerwise, least_squares, operations, pruning, shape_edits
from dfkd_ray.compression.channel_scores import SCORES, squared_norms
from dfkd_ray.compression.channels import Choice
from dfkd_ray.compression.moments import Moments
from dfkd_ray.config import PruningConfig, TrialConfig, columns_of, stable_hash, validate, versions
from dfkd_ray.description import ShapeEdit
from dfkd_ray.report import aggregates
from dfkd_ray.results.selecting import matching
from dfkd_ray.sweep import estimate
from dfkd_ray.trial import identity, speed, structure
from helpers import (
    TINY_SETS,
    TINY_WORDS,
    costs_of,
    jobs_of,
    randomise_statistics,
    refusal,
    same_weights,
    tiny_network,
    tiny_sweep,
    tiny_trial,
)

CIFAR = {"width_multiplier": 0.125, "stem": "cifar"}
NETWORKS = {
    "resnet18": CIFAR,
    "resnet34": CIFAR,
    "resnet50": CIFAR,
    "wide_resnet50_2": CIFAR,
    "mobilenet_v2": CIFAR,
    "vgg19_bn": CIFAR,
    "densenet121": CIFAR,
    "shufflenet_v2_x1_0": CIFAR,
    "resnet20": {"width_multiplier": 0.5},  # zero channels beside others in its shortcuts
    "timm:test_efficientnet": {},  # depthwise, gates, swish
    "timm:test_convnext": {},  # LayerNorm, linear layers on channels-last
    "timm:test_vit": {},
}
SHAPE = (3, 16, 16)
STRUCTURES = ("unstructured", "channels")


def built(name: str, arguments: dict[str, Any] | None = None) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random statistics, and the shape of its images."""
    torch.manual_seed(0)
    shape = (3, 160, 160) if name == "timm:test_vit" else (3, 32, 32) if "timm" in name or "vgg" in name else SHAPE
    network = models.build(name, arguments or NETWORKS.get(name, {}), num_classes=5, image_shape=shape)
    randomise_statistics(network)
    return network.requires_grad_(False), shape


def wants(sparsity: float = 0.4, **fields: Any) -> PruningConfig:
    """A config of structured pruning."""
    return PruningConfig(structure="channels", sparsity=sparsity, **{"importance": "magnitude", **fields})


def chosen(network: nn.Module, shape: tuple[int, ...], config: PruningConfig) -> Choice:
    """What is removed from a network."""
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(3))
    return channels.choose(network, channels.prepare(network, shape, config.importance), config, images)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def error_of(network: nn.Module, choice: Choice, shape: tuple[int, ...]) -> float:
    """How far the logits of the small network are from those of the masked one, relative to the largest."""
    masked, small = deepcopy(network), channels.sliced(network, choice.edits)
    pruning.apply(masked, choice.masks)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))
    expected, found = masked(images), small(images)
    return float((expected - found).abs().max() / expected.abs().max())


# ---- what is removed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_small_network_is_the_masked_one_and_has_the_wanted_parameters(name):
    network, shape = built(name)
    choice = chosen(network, shape, wants(0.3))
    small = channels.sliced(network, choice.edits)
    assert error_of(network, choice, shape) < 1e-5
    assert choice.share == pytest.approx(1 - num_parameters(small) / num_parameters(network), abs=1e-9)
    assert abs(choice.share - 0.3) < channels.TOLERANCE
    modules = dict(small.named_modules())
    for path, (kept, before) in choice.widths.items():
        assert shape_edits.dimensions(modules[path])["out"].size == kept < before


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0"])
def test_the_wanted_share_of_multiplications_goes(name):
    network, shape = built(name)
    before = sum(operations.macs(network, torch.zeros(1, *shape)).values())
    choice = chosen(network, shape, wants(0.4, target="macs"))
    after = sum(operations.macs(channels.sliced(network, choice.edits), torch.zeros(1, *shape)).values())
    assert choice.share == pytest.approx(1 - after / before, abs=1e-9)
    assert abs(choice.share - 0.4) < channels.TOLERANCE


def test_multiplications_are_those_of_the_layers_sizes():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Flatten(), nn.Linear(600, 7)
    )
    macs = operations.macs(network, torch.zeros(1, 4, 5, 5))
    assert macs == {"0.weight": 25 * 8 * 2 * 9, "1.weight": 25 * 8 * 6 * 4, "3.weight": 4200}


class Mixed(nn.Module):
    """Grouped, depthwise and transposed convolutions, PReLU, activations that are not 0 at 0, and a gate."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.prelu = nn.PReLU(12)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.squeeze, self.gate = nn.Linear(12, 4), nn.Linear(4, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.grouped(self.prelu(self.first(x)))
        x = torch.sigmoid(self.depthwise(nn.functional.softplus(self.norm(x))))
        x = self.up_grouped(nn.functional.softplus(self.up(x)))
        gate = torch.sigmoid(self.gate(torch.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).flatten(2).mean(2))


def mixed() -> nn.Module:
    torch.manual_seed(0)
    network = Mixed().eval()
    randomise_statistics(network)
    return network.requires_grad_(False)


@pytest.mark.parametrize("importance", SCORES)
def test_layers_of_every_kind_are_sliced(importance):
    network = mixed()
    config = wants(0.5, importance=importance)
    if importance == "batchnorm_scale":
        config = wants(0.1, importance=importance)
    choice = chosen(network, (3, 8, 8), config)
    assert error_of(network, choice, (3, 8, 8)) < 1e-5
    if importance == "batchnorm_scale":
        assert set(choice.widths) == {"grouped", "depthwise"} and "no BatchNorm" in "".join(choice.warnings)
    else:
        assert set(choice.widths) == {"first", "grouped", "depthwise", "up", "up_grouped", "squeeze", "gate"}
    small: Any = channels.sliced(network, choice.edits)
    assert (
        small.depthwise.groups == small.depthwise.in_channels == small.norm.num_features == small.grouped.out_channels
    )
    assert small.grouped.out_channels % 3 == 0 and small.prelu.num_parameters == small.first.out_channels


def test_the_importance_decides_what_goes():
    network: Any = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten()
    ).eval()
    network.append(nn.Linear(24, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
        network[0].weight.copy_(torch.randn(4, 3, 1, 1).sign() * 0.5)
        network[0].weight[1] *= 0.01  # lowest magnitude, but BatchNorm brings it back
        network[1].running_var[1] = 1e-4
        network[1].weight[2] = 0.3  # lowest scale
        network[1].bias.fill_(5.0)
        network[1].weight[3], network[1].running_var[3] = 0.6, 1e4  # hardly moves
        network[3].weight.copy_(torch.randn(6, 4, 1, 1).sign())
    images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    group = next(group for group in dependencies.find(network, images[:1]).groups if group.name == "0")
    lowest = {name: int(score(network, [group], images)[0].argmin()) for name, score in SCORES.items()}
    gone = {name: {dict(group.units[unit])["0", "out"]} for name, unit in lowest.items()}
    assert gone == {"magnitude": {1}, "batchnorm_scale": {2}, "activations": {3}}


@pytest.mark.parametrize(
    "module", [nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(6, 4)]
)
def test_squared_norms_are_those_of_the_weights_that_a_slice_removes(module):
    sides: Any = (("out", 4), ("in", 6))
    for dimension, size in sides:
        norms = squared_norms(module, dimension)
        for pair in range(size // 2):  # one of each of two groups
            gone = {pair, pair + size // 2}
            edit = ShapeEdit(module="0", dimension=dimension, kept=tuple(set(range(size)) - gone))
            sequence: Any = shape_edits.replay(nn.Sequential(deepcopy(module)), [edit])
            small = sequence[0]
            lost = module.weight.detach().double().square().sum() - small.weight.double().square().sum()
            assert float(sum(norms[index] for index in gone)) == pytest.approx(float(lost.detach()), rel=1e-5)


def test_kept_channels_are_multiples_of_round_to():
    network, shape = built("resnet18", {"width_multiplier": 0.5, "stem": "cifar"})
    choice = chosen(network, shape, wants(0.5, round_to=8))
    assert choice.widths and all(kept % 8 == 0 for kept, _ in choice.widths.values())


def test_more_than_can_be_removed_is_refused_and_less_than_a_channel_too():
    network, shape = built("resnet20")
    prepared = channels.prepare(network, shape)
    refusal(lambda: channels.choose(network, prepared, wants(0.99)), "pruning.sparsity=0.99: at most")
    refusal(lambda: channels.choose(network, prepared, wants(0.0001)), "removes no channel: a step is more than that")


class Fixed(nn.Module):
    """Each kind of network of which some channels cannot go."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(4 if kind == "chunk" else 8, 8, 1)
        self.norm = nn.GroupNorm(2, 8) if kind == "groupnorm" else nn.Identity()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.kind == "softmax":
            x = x.softmax(1)
        if self.kind == "chunk":
            left, right = x.chunk(2, 1)
            x = left * right
        if self.kind == "literal":
            x = x * torch.zeros(8).add(2.0)[:, None, None]
        if self.kind == "parameter":
            x = x * self.scale
        if self.kind == "names alone":
            x = x + torch.mean(input=x, dim=(2, 3), keepdim=True)
        if self.kind == "std of all":
            x = x / (x.std(False) + 1)
        return self.head(self.second(x).mean((2, 3)))


@pytest.mark.parametrize("kind", ["groupnorm", "softmax", "chunk", "literal", "parameter", "names alone", "std of all"])
def test_channels_that_cannot_go_alone_stay_and_are_named(kind):
    torch.manual_seed(0)
    network = Fixed(kind).eval()
    choice = chosen(network, (3, 4, 4), wants(0.2))
    assert set(choice.widths) == {"second"} and error_of(network, choice, (3, 4, 4)) < 1e-5
    assert "channels that stay: first" in choice.warnings[-1]


def block(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


class Branches(nn.Module):
    """A network with layers that do not run in every pass: `what` says which."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU())  # its layers have two names each
        self.a, self.b, self.aux = block(16, 24), block(16, 24), nn.Linear(16, 5)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        branch = self.b if self.what == "images" and x.mean() > 1 else self.a
        x = self.stem(x)
        logits = self.fc(branch(x).mean((2, 3)))
        if self.what == "training" and self.training:
            return logits, self.aux(x.mean((2, 3)))
        return logits


def branching(what: str) -> nn.Module:
    torch.manual_seed(0)
    network = Branches(what)
    randomise_statistics(network)
    return network.eval()


def test_a_network_whose_layers_run_on_some_images_only_is_refused_by_their_names():
    text = refusal(lambda: channels.prepare(branching("images"), (3, 8, 8)), "it depends on the image whether")
    assert "a.0, b.0 of this network run" in text


@pytest.mark.parametrize("what", ["never", "training"])
def test_layers_of_two_names_and_heads_of_training_alone_lose_channels_and_train(what):
    settings = TINY_SETS | {"pruning.structure": "channels", "latency.repeats": 3}
    about: Any = {"input_shape": (3, 16, 16), "num_classes": 5, "mean": 0.5, "std": 0.25}
    done = dfkd_ray.recover(branching(what), sparsity=0.5, settings=settings, progress=False, **about)
    widths = json.loads(done.row["channels"])
    assert done.row["status"] == "finished" and widths["conv1"][0] < 16
    student: Any = done.student.train()
    assert student(torch.randn(4, 3, 16, 16)).shape == (4, 5)
    assert (student.aux.in_features < 16) == (what == "training"), "a layer that never runs stays as it is"


class Spread(nn.Module):
    """A network that pools standard deviations, whose arguments are in another order than those of means."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.first(x).std((2, 3), True))


def test_channels_of_which_standard_deviations_are_pooled_can_go():
    assert set(chosen(Spread().eval(), (3, 4, 4), wants(0.3)).widths) == {"first"}


class Stored(nn.Module):
    """A network that keeps its shape in an attribute."""

    def __init__(self, error: type[Exception]):
        super().__init__()
        self.first, self.width, self.head, self.error = nn.Conv2d(3, 8, 1), 8, nn.Linear(8, 5), error

    def forward(self, x):
        x = self.first(x)
        if x.shape[1] != self.width:
            raise self.error("another width")
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, AttributeError])
def test_a_network_of_which_nothing_can_be_removed_is_refused(error):
    text = refusal(
        lambda: channels.prepare(Stored(error).eval(), (3, 4, 4)), "no channel of this network can be removed"
    )
    assert "another width" in text


def test_memory_that_runs_out_is_not_taken_for_a_network_that_cannot_be_sliced(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(channels, "check_equal", full)
    with pytest.raises(torch.OutOfMemoryError):
        channels.prepare(tiny_network().eval(), (1, 8, 8))


def test_a_network_of_one_layer_is_refused():
    only_head = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    refusal(lambda: channels.prepare(only_head, (3, 4, 4)), "no channel of this network can be removed")


def test_a_wrong_slice_is_noticed():
    network, shape = built("resnet20")
    choice = chosen(network, shape, wants(0.3))
    masked, small = deepcopy(network), channels.sliced(network, choice.edits)
    pruning.apply(masked, choice.masks)
    images = torch.randn(3, *shape)
    channels.check_equal(masked, small, images)
    weight: Any = small.get_submodule("blocks.4.conv2").weight
    weight.copy_(weight.flip(0))
    refusal(lambda: channels.check_equal(masked, small, images), "logits differ")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_the_slices_are_those_of_torch_pruning(name):
    tp = pytest.importorskip("torch_pruning")
    network, shape = built(name)
    found = dependencies.find(network.requires_grad_(True), torch.randn(1, *shape))
    groups = found.groups[:: max(1, len(found.groups) // 8)]
    removed = {index: list(range(0, len(group.units), 3)) for index, group in enumerate(groups)}
    theirs = deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=torch.randn(1, *shape))
    modules = dict(theirs.named_modules())
    for index, group in enumerate(groups):
        own = [channel for unit in removed[index] for axis, channel in group.units[unit] if axis == (group.name, "out")]
        graph.get_pruning_group(modules[group.name], tp.prune_conv_out_channels, own).prune()
    small = channels.sliced(network, channels.edits_of(network, groups, removed))
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert same_weights(small, theirs)


# ---- masks and reconstruction ----------------------------------------------------------------------------------------


def test_one_factor_for_all_rows_gives_what_one_for_each_row_gives():
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(3, 200, n, dtype=torch.float64, generator=generator) for n in (12, 5))
    moments = Moments(x.mean(1), x.mT @ x / 200, z.mT @ x / 200, z.mean(1))
    kept = (torch.rand(3, 1, 12, generator=generator) > 0.4) & (torch.rand(3, 5, 1, generator=generator) > 0.3)
    dense = torch.randn(3, 5, 12, dtype=torch.float64, generator=generator)
    together = least_squares.solve_together(moments, dense, kept, 0.01)
    assert torch.allclose(together, least_squares.solve(moments, dense, kept, 0.01), atol=1e-12)
    assert not together[~kept].any()


def test_masks_of_channels_are_recognised_and_those_of_weights_are_not():
    network, shape = built("resnet20")
    assert all(map(least_squares.of_channels, chosen(network, shape, wants(0.3)).masks.values()))
    assert not all(map(least_squares.of_channels, pruning.masks(network, PruningConfig(sparsity=0.3)).values()))


@torch.no_grad()
def test_reconstruction_compensates_for_a_channel_that_others_imply():
    torch.manual_seed(0)
    teacher: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)).eval()
    teacher[0].weight[7] = teacher[0].weight[:3].mean(0)
    teacher[0].bias[7] = teacher[0].bias[:3].mean() + 2.0
    student = deepcopy(teacher)
    edits = [
        ShapeEdit(module="0", dimension="out", kept=tuple(range(7))),
        ShapeEdit(module="1", dimension="in", kept=tuple(range(7))),
    ]
    masks = channels.masks_of(student, edits)
    pruning.apply(student, masks)
    images = torch.randn(64, 3, 6, 6)
    before = (teacher(images) - student(images)).abs().max()
    layerwise.reconstruct(student, teacher, lambda n: images[:n], 64, masks, ridge=1e-6)
    small = channels.sliced(student, edits)
    assert (teacher(images) - small(images)).abs().max() < 1e-3 * before


# ---- edits and bundles -----------------------------------------------------------------------------------------------


def edit(module: str = "conv1", dimension: Any = "out", kept: tuple[int, ...] = (0, 1)) -> ShapeEdit:
    return ShapeEdit(module=module, dimension=dimension, kept=kept)


@pytest.mark.parametrize(
    ("edits", "parts"),
    [
        ([edit("nowhere")], ["nowhere is no layer"]),
        ([edit("fc", kept=(0, 10))], ["fc: channel 10 of out, which has 10"]),
        ([edit("bn1", "in")], ["bn1, a BatchNorm2d, has no dimension in"]),
        ([edit("blocks")], ["blocks, a Sequential, has no dimension out"]),
        ([edit("bn1"), edit("bn1")], ["bn1 has two edits of out"]),
    ],
)
def test_edits_that_do_not_fit_are_refused_by_the_layers_name(edits, parts):
    refusal(lambda: shape_edits.replay(tiny_network(), edits), *parts)


def test_groups_keep_equally_many():
    network = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2))
    refusal(lambda: shape_edits.replay(network, [edit("0", "out", (0, 1, 2, 4))]), "2 groups must keep equally many")
    small: Any = shape_edits.replay(network, [edit("0", "out", (0, 3, 4, 6)), edit("0", "in", (1, 2))])
    small = small[0]
    assert small.weight.shape == (4, 1, 1, 1) and (small.in_channels, small.out_channels, small.groups) == (2, 4, 2)


def test_norms_keep_their_own_channels():
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.PReLU(8), nn.BatchNorm1d(8))
    small: Any = shape_edits.replay(network, [edit(str(index), "out", (1, 2, 4, 7)) for index in range(4)])
    assert small[0].num_channels == 4 and small[1].normalized_shape == (4,) and small[2].num_parameters == 4
    assert small[3].running_var.shape == (4,) and small[1](torch.randn(2, 4)).shape == (2, 4)


def test_edits_compose():
    network, shape = built("resnet20")
    first = chosen(network, shape, wants(0.3))
    small = channels.sliced(network, first.edits)
    second = chosen(small, shape, wants(0.3))
    at_once = channels.sliced(network, shape_edits.composed(first.edits, second.edits))
    assert same_weights(channels.sliced(small, second.edits), at_once)


@pytest.mark.parametrize("num_outputs", [8, 16])
def test_a_grouped_convolution_with_one_channel_left_in_each_group_stays_grouped(num_outputs):
    """It looks depthwise then. To remove whole groups would be no edit of its architecture, which has more of each."""

    def grouped() -> nn.Module:
        torch.manual_seed(0)
        ends = nn.Conv2d(num_outputs, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 5)
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, num_outputs, 1, groups=4), *ends).eval()

    step = num_outputs // 4
    of_groups = [edit("1", "out", tuple(range(0, num_outputs, step))), edit("1", "in", (0, 2, 4, 6))]
    around = [edit("0", "out", (0, 2, 4, 6)), edit("2", "in", tuple(range(0, num_outputs, step)))]
    first = [*around, *of_groups]
    small = shape_edits.replay(grouped(), first)
    second = chosen(small, (3, 2, 2), wants(0.2))
    at_once = channels.sliced(grouped(), shape_edits.composed(first, second.edits))
    assert same_weights(channels.sliced(small, second.edits), at_once)


def trial_of(teacher: Path, **fields: Any) -> TrialConfig:
    settings = {"pruning.structure": "channels", "pruning.sparsity": 0.4, "distillation.num_steps": 3}
    return validate(TrialConfig, tiny_trial(teacher, **{**settings, "distillation.eval_every": 1, **fields}))


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> tuple[trial.Outcome, Path]:
    """A trial's outcome, and its student's bundle."""
    outcome = trial.run(trial_of(tiny_teacher), bundles.load(tiny_teacher))
    folder = tmp_path_factory.mktemp("students") / "student"
    outcome.save_student(folder)
    return outcome, folder


def test_a_student_is_a_plain_small_network_and_its_bundle_gives_it_back(student):
    outcome, folder = student
    loaded = bundles.load(folder)
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded.network(images), outcome.student(images))
    assert same_weights(loaded.network, outcome.student)
    assert num_parameters(loaded.network) == outcome.row["num_parameters"] < outcome.row["teacher_num_parameters"]
    assert json.loads((folder / "teacher.json").read_text())["schema_version"] == "dfkd_ray.bundle/2"


def test_the_description_of_a_large_network_can_be_read_again(tiny_teacher, tmp_path, monkeypatch):
    """An EfficientNetV2-L has 900,000 channels to make or read, and a bundle's description may have 8 MB."""
    edits = tuple(edit(f"layers.{index}.conv", "out", tuple(range(1000, 3000))) for index in range(9))
    notes = {"kept": 'a text\n  "kept": [\n 1,\n 2\n ]'}
    changes = {"shape_edits": edits, "schema_version": "dfkd_ray.bundle/2", "notes": notes}
    info = bundles.read_info(tiny_teacher).model_copy(update=changes)
    written = bundles.save(tmp_path / "large", info, {})
    assert bundles.read_info(tmp_path / "large") == written
    assert (tmp_path / "large" / "teacher.json").stat().st_size < 9 * 2000 * 8_000_000 / 900_000
    monkeypatch.setattr(untrusted, "MAX_JSON_BYTES", 100_000)
    refusal(lambda: bundles.save(tmp_path / "larger", info, {}), "teacher.json", "expected at most")
    assert not (tmp_path / "larger").exists()


def test_a_bundle_without_edits_is_of_the_first_schema(tiny_teacher):
    described = json.loads((tiny_teacher / "teacher.json").read_text())
    assert described["schema_version"] == "dfkd_ray.bundle/1" and "shape_edits" not in described


def damaged_edits(folder: Path, place: Path, change: Any) -> str:
    """The refusal of a student's bundle whose description is changed."""
    place.mkdir()
    (place / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    described = json.loads((folder / "teacher.json").read_text())
    change(described)
    (place / "teacher.json").write_text(json.dumps(described))
    return refusal(lambda: bundles.load(place))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: d["shape_edits"][0].update(kept=[1, 0]), "expected ascending channels"),
        (lambda d: d["shape_edits"][0].update(kept=[0, 0]), "expected ascending channels"),
        (lambda d: d["shape_edits"][0].update(kept=[-1, 0]), "kept"),
        (lambda d: d["shape_edits"][0].update(kept=[0, 2**60]), "kept"),
        (lambda d: d["shape_edits"][0].update(kept=[]), "kept"),
        (lambda d: d["shape_edits"][0].update(kept=[True]), "kept"),
        (lambda d: d["shape_edits"][0].update(kept=[0, 1000]), "conv1: channel 1000 of out"),
        (lambda d: d["shape_edits"][0].update(dimension="depth"), "dimension"),
        (lambda d: d["shape_edits"][0].update(module="../etc"), "is no layer of this network"),
        (lambda d: d["shape_edits"].pop(0), "does not fit the architecture"),
        (lambda d: d["shape_edits"][0]["kept"].pop(), "does not fit the architecture"),
        (lambda d: d.update(shape_edits=[]), "schema_version is dfkd_ray.bundle/2 with 0 shape_edits"),
        (lambda d: d.update(schema_version="dfkd_ray.bundle/1"), "schema_version is dfkd_ray.bundle/1 with"),
        (lambda d: d.update(schema_version="dfkd_ray.bundle/3"), "this version reads"),
    ],
)
def test_hostile_edits_are_refused_in_one_line(student, tmp_path, change, part):
    assert part in damaged_edits(student[1], tmp_path / "damaged", change)


# ---- trials ----------------------------------------------------------------------------------------------------------


def test_the_row_says_what_was_removed(student):
    row = student[0].row
    assert row["status"] == "finished" and row["pruning.structure"] == "channels" and "pruning.criterion" not in row
    assert row["achieved_sparsity"] == 1 - row["num_parameters"] / row["teacher_num_parameters"]
    assert abs(row["achieved_sparsity"] - 0.4) < channels.TOLERANCE
    assert 0 < row["num_macs"] < row["teacher_num_macs"]
    widths = json.loads(row["channels"])
    assert widths and all(0 < kept < before for kept, before in widths.values())


@pytest.mark.parametrize("importance", SCORES)
@pytest.mark.parametrize("bn_mode", ["paired", "trained", "frozen"])
def test_every_importance_recovers(tiny_teacher, importance, bn_mode):
    fields = {"pruning.importance": importance, "distillation.bn_mode": bn_mode, "pruning.target": "macs"}
    outcome = trial.run(trial_of(tiny_teacher, **fields), bundles.load(tiny_teacher))
    row = outcome.row
    assert row["status"] == "finished" and abs(1 - row["num_macs"] / row["teacher_num_macs"] - 0.4) < channels.TOLERANCE


def test_without_sparsity_nothing_counts_as_removed_from_a_teacher_with_zeros(tiny_teacher):
    teacher = bundles.load(tiny_teacher)
    for weight in pruning.prunable(teacher.network).values():
        weight.mul_(torch.rand_like(weight) < 0.5)
    fields = {"pruning.sparsity": 0.0, "distillation.num_steps": 0}
    row = trial.run(trial_of(tiny_teacher, **fields), teacher).row
    assert row["achieved_sparsity"] == 0 and row["num_parameters"] == row["teacher_num_parameters"]


def test_a_small_student_is_a_teacher_again(student, tmp_path):
    first = bundles.load(student[1])
    outcome = trial.run(trial_of(student[1]), first)
    outcome.save_student(tmp_path / "again")
    assert outcome.student is not None
    assert same_weights(bundles.load(tmp_path / "again").network, outcome.student)
    assert outcome.row["num_parameters"] < student[0].row["num_parameters"] == outcome.row["teacher_num_parameters"]
    travelled = bundles.from_arrays(bundles.to_arrays(first))
    assert same_weights(travelled.network, first.network)


def test_a_killed_trial_goes_on_with_the_small_network(tiny_teacher, tmp_path):
    teacher, config = bundles.load(tiny_teacher), trial_of(tiny_teacher, **{"distillation.checkpoint_every": 1})

    def stop(stage: str, done: int, _total: int, _shown: object) -> None:
        if stage == "distilling" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(config, teacher, checkpoint=tmp_path, observer=trial.Observer(progress=stop))
    assert list(tmp_path.rglob("*.safetensors"))
    resumed, whole = trial.run(config, teacher, checkpoint=tmp_path), trial.run(config, teacher)
    assert resumed.student is not None and whole.student is not None
    assert same_weights(resumed.student, whole.student)


def test_nothing_that_can_be_removed_is_refused_before_images_are_made(tmp_path):
    teacher = bundles.Teacher.from_network(
        nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(256, 10)),
        input_shape=(1, 16, 16),
        num_classes=10,
        mean=0.5,
        std=0.25,
    )
    seen: list[str] = []
    observer = trial.Observer(progress=lambda stage, *_: seen.append(stage))
    refusal(lambda: trial.run(trial_of(tmp_path), teacher, observer=observer), "no channel of this network")
    assert not seen
    pruned, dense = trial_of(tmp_path), trial_of(tmp_path, **{"pruning.sparsity": 0.0})
    refusal(lambda: sweep.plan([dense, pruned], lambda _name: teacher), "no channel of this network")
    assert len(sweep.plan([dense], lambda _name: teacher)) == 1


class InFours(nn.Module):
    """A network that takes a multiple of four channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 10)

    def forward(self, x):
        x = self.norm(self.first(x))
        assert x.shape[1] % 4 == 0, "not in fours"
        return self.head(x.mean((2, 3)))


def test_a_number_of_channels_that_the_network_does_not_take_is_said_in_one_line(tmp_path):
    torch.manual_seed(0)
    described = {"input_shape": (1, 16, 16), "num_classes": 10, "mean": 0.5, "std": 0.25}
    teacher = bundles.Teacher.from_network(InFours(), **described)
    fields = {"pruning.sparsity": 0.2, "pruning.importance": "magnitude"}
    refusal(lambda: trial.run(trial_of(tmp_path, **fields), teacher), "not in fours", "try another pruning.round_to")
    rounded = {**fields, "pruning.round_to": 4, "pruning.sparsity": 0.3}
    assert trial.run(trial_of(tmp_path, **rounded), teacher).row["status"] == "finished"


def test_the_command_line_prunes_channels(tiny_teacher, tmp_path, run_cli):
    words = ["recover", str(tiny_teacher), *TINY_WORDS, "--sparsity", "0.4", "--set", "pruning.structure=channels"]
    done = run_cli(*words, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"))
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "out" / "row.json").read_text())
    assert row["num_parameters"] < row["teacher_num_parameters"]
    assert f"{row['num_macs']:,} multiplications an image, of the teacher {row['teacher_num_macs']:,}" in done.out
    assert num_parameters(bundles.load(tmp_path / "out" / "student").network) == row["num_parameters"]
    assert ", without some channels of " in run_cli("teacher", "info", str(tmp_path / "out" / "student")).out
    assert "without some channels" not in run_cli("teacher", "info", str(tiny_teacher)).out


def test_names_and_conditions_tell_structures_apart_where_a_row_has_none():
    both = {name: validate(TrialConfig, tiny_trial("t", **{"pruning.structure": name})) for name in STRUCTURES}
    assert {names.name_from(parts).split(" structure ")[1] for parts in names.parts_of(both).values()} == set(both)
    frame = pd.DataFrame([columns_of(config) for config in both.values()], index=list(both))
    for name in STRUCTURES:
        assert list(frame.index[matching(frame, f"structure={name}")]) == [name]
        assert list(frame.index[~matching(frame, f"structure!={name}")]) == [name]


def test_tables_of_the_report_name_the_structure_and_what_sparsity_is_a_share_of():
    fields = {"pruning.structure": ["channels", "channels", None], "pruning.target": ["parameters", "macs", None]}
    rows = pd.DataFrame({**fields, "teacher_hash": "h", "teacher": "t"})
    rows = rows.assign(**{"student.architecture": None, "student.arguments": "{}", "teacher_architecture": "resnet20"})
    assert list(aggregates.network_labels(rows)) == ["resnet20, channels", "resnet20, channels by MACs", "resnet20"]


# ---- config ----------------------------------------------------------------------------------------------------------

OF_BEFORE = {"criterion", "sparsity", "schedule", "schedule_end", "schedule_every", "spare_first", "spare_last"}


def test_a_trial_without_channels_has_the_fields_and_so_the_id_that_it_had():
    config = validate(TrialConfig, {"teacher": "t"})
    assert set(config.model_dump()["pruning"]) == OF_BEFORE
    assert {name for name in columns_of(config) if name.startswith("pruning.")} == {f"pruning.{n}" for n in OF_BEFORE}
    explicit = validate(TrialConfig, {"teacher": "t", "pruning": {"structure": "unstructured", "round_to": 1}})
    assert explicit == config
    structured = validate(TrialConfig, {"teacher": "t", "pruning": {"structure": "channels"}})
    again = validate(TrialConfig, structured.model_dump())
    assert again == structured
    assert set(structured.model_dump()["pruning"]) == {"structure", "sparsity", "target", "importance", "round_to"}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"pruning.target": "macs"}, "target acts with structure=channels only"),
        ({"pruning.importance": "magnitude"}, "importance acts with structure=channels only"),
        ({"pruning.round_to": 8}, "round_to acts with structure=channels only"),
        *(
            (
                {"pruning.structure": "channels", f"pruning.{name}": value},
                f"{name} acts with structure=unstructured",
            )
            for name, value in (
                ("criterion", "obs"),
                ("schedule", "cubic"),
                ("spare_first", True),
                ("spare_last", True),
            )
        ),
        ({"pruning.structure": "channels", "distillation.feature_weight": 1.0}, "distillation.feature_weight"),
    ],
)
def test_options_that_cannot_act_are_refused(fields, part):
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        validate(TrialConfig, tiny_trial("t", **fields))


# ---- latency ---------------------------------------------------------------------------------------------------------


def seconds_by_channels(network: nn.Module) -> Any:
    """A stand-in for a clock: the seconds that a network saves are the share of its channels that are gone."""

    def width(each: nn.Module) -> int:
        return sum(module.weight.shape[0] for module in each.modules() if isinstance(module, nn.Conv2d))

    return lambda small: 1 - width(small) / width(network)


def test_channels_go_until_the_wanted_share_of_the_seconds_is_saved_and_each_step_is_measured():
    network, shape = built("resnet20", {})
    found, config = channels.prepare(network, shape), wants(0.5, target="latency")
    measure, calls = seconds_by_channels(network), []

    def counted(small: nn.Module) -> float:
        calls.append(small)
        return measure(small)

    choice = channels.choose(network, found, config, removed_seconds=counted)
    assert choice.share == measure(channels.sliced(network, choice.edits)) == pytest.approx(0.5, abs=0.03)
    assert len(calls) <= channels.MEASURED_STEPS + 2
    again = channels.choose(network, found, config, removed_seconds=lambda _: 0.1, ratio=choice.ratio)
    assert again.edits == choice.edits and "10.0% of the seconds" in again.warnings[0]
    never = wants(0.5, target="latency")
    refusal(lambda: channels.choose(network, found, never, removed_seconds=lambda _: 0.0), "0.0% of the seconds")


def test_a_trial_by_latency_measures_its_student_and_keeps_its_choice_when_it_is_resumed(
    tiny_teacher, tmp_path, monkeypatch
):
    teacher = bundles.load(tiny_teacher)
    options = {"pruning.structure": "channels", "pruning.target": "latency", "pruning.sparsity": 0.3}
    options |= {"pruning.importance": "magnitude", "latency.repeats": 3}
    config = validate(TrialConfig, tiny_trial(tiny_teacher, **options))
    monkeypatch.setattr(speed, "removed_seconds", lambda _config, network, *_: seconds_by_channels(network))
    first = trial.run(config, teacher, checkpoint=tmp_path)
    row = first.row
    assert row["status"] == "finished" and row["latency_s"] > 0 and row["teacher_latency_s"] > 0
    assert row["latency_ratio"] == pytest.approx(row["teacher_latency_s"] / row["latency_s"])
    assert ("not faster" in (row["latency_warning"] or "")) == (row["latency_ratio"] < latency.FASTER)
    assert row["latency_warning"] is None or row["latency_warning"] not in (row["warnings"] or "")
    monkeypatch.setattr(speed, "removed_seconds", lambda *_: lambda _: 0.3)  # another machine, or a busy one
    assert trial.run(config, teacher, checkpoint=tmp_path).row["channels"] == row["channels"]
    assert identity.is_checkpoint(structure.CHOICE), "it is removed with the trial's checkpoints"


def test_latency_is_null_in_the_teachers_shape_and_where_it_is_not_wanted(tiny_teacher):
    teacher = bundles.load(tiny_teacher)
    for options in (
        {"pruning.sparsity": 0.5},
        {"pruning.structure": "channels", "pruning.importance": "magnitude", "latency.runtime": "none"},
    ):
        row = trial.run(validate(TrialConfig, tiny_trial(tiny_teacher, **options)), teacher).row
        assert row["status"] == "finished" and row.get("latency_ratio") is None, options


def test_a_trial_keeps_its_id_from_before_latency_was_measured_and_another_runtime_is_another_trial(tiny_teacher):
    teacher = bundles.load(tiny_teacher)
    plain, other = (
        validate(TrialConfig, tiny_trial(tiny_teacher, **{"latency.repeats": 15, "latency.runtime": runtime}))
        for runtime in ("pytorch", "none")
    )
    newer = {
        "enough_kl": True,
        "latency": True,
        "quantisation": True,
        "distillation": {"attention_weight", "num_passes"},
    }
    newer["reference"] = {"mixed_with"}
    fields = plain.model_dump(mode="json", exclude={"teacher": True, "device": True, **newer})
    before = stable_hash({"teacher": teacher.hash, "config": fields, "versions": versions()})
    assert trial.trial_id(plain, teacher) == f"t-{before[:12]}" != trial.trial_id(other, teacher)


def test_a_latency_that_cannot_be_measured_is_refused_before_the_work(tiny_teacher, monkeypatch):
    refusal(
        lambda: validate(
            TrialConfig,
            tiny_trial(
                tiny_teacher,
                **{"pruning.structure": "channels", "pruning.target": "latency", "latency.runtime": "none"},
            ),
        ),
        "pruning.target=latency is measured",
    )
    monkeypatch.setattr(exporting, "is_installed", lambda name: name != "onnxruntime")
    config = validate(TrialConfig, tiny_trial(tiny_teacher, **{"latency.runtime": "onnxruntime"}))
    refusal(lambda: trial.check(config, bundles.load(tiny_teacher), ()), "onnxruntime, not installed")


def test_the_estimate_takes_a_student_of_fewer_channels_as_cheaper(tiny_teacher):
    fields = {"pruning.sparsity": [0.0, 0.5, 0.9], "pruning.structure": ["channels"]}
    jobs = jobs_of(tiny_sweep(tiny_teacher, fields))
    jobs = [replace(job, config=with_steps(job.config, 1000)) for job in jobs]
    dense, half, tenth = (estimate.trial_s(job, costs_of(jobs), 0) for job in jobs)
    masks = jobs_of(tiny_sweep(tiny_teacher, {"pruning.sparsity": [0.5]}))[0]
    assert estimate.share_of_step(masks.config) == 1.0
    # Each of the 1,000 steps takes 2 seconds, a quarter of it for the teacher.
    assert dense - half == pytest.approx(2000 * 0.75 * 0.5, rel=0.05)
    assert dense - tenth == pytest.approx(2000 * 0.75 * 0.9, rel=0.05)


def with_steps(config: TrialConfig, num_steps: int) -> TrialConfig:
    return config.model_copy(update={"distillation": config.distillation.model_copy(update={"num_steps": num_steps})})
