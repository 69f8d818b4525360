"""Layer-wise reconstruction: the moments of every kind of layer, least squares for a mask, residual sums, refusals."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray import batchnorm
from dfkd_ray.compression import layerwise, least_squares, moments, pruning
from dfkd_ray.compression.moments import LAYERS, Arguments, Geometry
from dfkd_ray.config import PruningConfig
from helpers import randomise_statistics, refusal, tiny_network

NUM_IMAGES = 48


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(network: nn.Module, seed: int = 0) -> nn.Module:
    """A network in eval mode with weights, biases and statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.normal_(0, fan_in**-0.5 if parameter.ndim > 1 else 0.3, generator=generator)
    randomise_statistics(network, seed)
    return network.eval()


def dropped(network: nn.Module, sparsity: float = 0.5, seed: int = 0) -> pruning.Masks:
    """Masks that drop weights by chance."""
    generator = torch.Generator().manual_seed(seed)
    weights = pruning.prunable(network)
    return {name: torch.rand(weight.shape, generator=generator) >= sparsity for name, weight in weights.items()}


def pruned(teacher: nn.Module, masks: pruning.Masks) -> nn.Module:
    student = deepcopy(teacher)
    pruning.apply(student, masks)
    return student


def repaired(
    teacher: nn.Module, masks: pruning.Masks, images: Tensor, ridge: float = 0.01
) -> tuple[nn.Module, layerwise.Done]:
    student = pruned(teacher, masks)
    return student, layerwise.reconstruct(student, teacher, lambda n: images[:n], len(images), masks, ridge=ridge)


@torch.no_grad()
def error(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Mean squared error of the student's outputs."""
    return float((student(images) - teacher(images)).square().mean())


# ---- the moments of a layer ------------------------------------------------------------------------------------------

IMAGES_1D, IMAGES_2D, IMAGES_3D = (3, 4, 11), (3, 4, 7, 6), (2, 4, 5, 4, 3)
KINDS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear without bias": (nn.Linear(5, 3, bias=False), (7, 5)),
    "linear on tokens": (nn.Linear(5, 3), (4, 6, 5)),
    "linear on windows": (nn.Linear(5, 3), (2, 3, 4, 5)),
    "conv": (nn.Conv2d(4, 6, 3), IMAGES_2D),
    "1x1": (nn.Conv2d(4, 6, 1, bias=False), IMAGES_2D),
    "oblong, strided, padded": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), IMAGES_2D),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), IMAGES_2D),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), IMAGES_2D),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2), IMAGES_2D),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2)), IMAGES_2D),
    "same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same"), IMAGES_2D),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), IMAGES_2D),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), IMAGES_2D),
    "circular": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", stride=2), IMAGES_2D),
    "replicate, same": (nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"), IMAGES_2D),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), IMAGES_2D),
    "transposed, strided": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), IMAGES_2D),
    "transposed, oblong": (nn.ConvTranspose2d(4, 6, (2, 3), (3, 2), padding=(0, 1), output_padding=(2, 0)), IMAGES_2D),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, padding=1), IMAGES_2D),
    "transposed, dilated": (nn.ConvTranspose2d(4, 6, 3, dilation=2, stride=2, bias=False), IMAGES_2D),
    "1-D": (nn.Conv1d(4, 6, 5, stride=2, padding=2, groups=2), IMAGES_1D),
    "1-D transposed": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2, groups=2), IMAGES_1D),
    "3-D": (nn.Conv3d(4, 6, (2, 3, 2), stride=(2, 1, 1), padding=1), IMAGES_3D),
    "3-D transposed": (nn.ConvTranspose3d(4, 6, 2, stride=(1, 2, 3), output_padding=(0, 1, 2), groups=2), IMAGES_3D),
}


class Calls(TorchFunctionMode):
    """The layers' functional calls in a forward pass."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in LAYERS:
            self.found.append((func, Arguments.of(args, kwargs or {}), result))
        return result


@torch.no_grad()
def called(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Geometry, Arguments, Tensor]:
    with Calls() as calls:
        layer(noise(*shape))
    ((func, call, result),) = calls.found
    return Geometry.of(func, call), call, result


def all_pairs(geometry: Geometry, call: Arguments, target: Tensor) -> tuple[Tensor, Tensor]:
    """Every input patch (n, groups, inputs) of a layer, and its target (n, groups, outputs)."""
    if not geometry.kernel:
        return call.input.flatten(0, -2)[:, None], target.flatten(0, -2)[:, None]
    return geometry.patches(call.input, target, torch.arange(len(target) * target[0, 0].numel()))


@pytest.mark.parametrize("kind", KINDS)
def test_patches_times_the_weight_are_the_layers_own_output(kind):
    layer, shape = KINDS[kind]
    geometry, call, result = called(made(layer), shape)
    x, z = all_pairs(geometry, call, result)
    assert x.shape[2] == geometry.num_inputs(call.input)
    product = torch.einsum("ngi,goi->ngo", x, geometry.rows(call.weight))
    if call.bias is not None:
        product = product + call.bias.view(geometry.groups, -1)
    torch.testing.assert_close(product, z, rtol=1e-4, atol=1e-5)
    if geometry.kernel:  # targets are those of the positions that were asked for
        some = torch.tensor([3, 0, len(x) - 1])
        torch.testing.assert_close(geometry.patches(call.input, result, some), (x[some], z[some]), rtol=0, atol=0)
        last = result.flatten(2).movedim(1, -1).flatten(0, 1)[len(x) - 1]
        assert torch.equal(z[-1].flatten(), last)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_their_inverse_give_the_weight_back(kind):
    layer, shape = KINDS[kind]
    geometry, call, _result = called(layer, shape)
    rows = geometry.rows(call.weight)
    assert rows.shape[0] == geometry.groups and rows.shape[2] == geometry.num_inputs(call.input)
    assert torch.equal(geometry.unrows(rows, call.weight), call.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_means_and_covariances_of_all_patches(kind):
    layer, shape = KINDS[kind]
    geometry, call, result = called(made(layer), shape)
    target = result + 3 * noise(*result.shape, seed=1) + 100.0
    found = geometry.moments(call.input, target, 1)
    x, z = (part.double().transpose(0, 1) for part in all_pairs(geometry, call, target))
    x0, z0 = x - x.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    expected = (x.mean(1), x0.mT @ x0 / x.shape[1], z0.mT @ x0 / x.shape[1], z.mean(1))
    for own, other in zip(vars(found).values(), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    about_zero = found.uncentred()
    torch.testing.assert_close(about_zero.gram, x.mT @ x / x.shape[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(about_zero.cross, z.mT @ x / x.shape[1], rtol=1e-4, atol=1e-3)


def test_where_there_are_more_positions_than_wanted_every_image_has_its_share(monkeypatch):
    monkeypatch.setattr(moments, "LEAST_POSITIONS", 50)
    layer = made(nn.Conv2d(1, 2, 1))
    geometry, call, result = called(layer, (10, 1, 9, 9))
    first, again = (geometry.moments(call.input, result, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    chosen = moments.sample(810, 50, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(torch.bincount(chosen // 81, minlength=10), torch.full((10,), 5))
    assert len(set(chosen.tolist())) == 50 and chosen.tolist() == sorted(chosen.tolist())


# ---- one layer -------------------------------------------------------------------------------------------------------


def test_a_linear_layer_is_fitted_as_by_lstsq():
    teacher, images = made(nn.Sequential(nn.Linear(6, 4))), noise(200, 6) @ noise(6, 6, seed=1) + 0.5
    masks = dropped(teacher)
    student, _done = repaired(teacher, masks, images, ridge=1e-9)
    with torch.no_grad():
        targets = teacher(images)
    for row, mask in enumerate(masks["0.weight"]):
        known = torch.cat([images[:, mask], torch.ones(200, 1)], dim=1)
        solution = torch.linalg.lstsq(known, targets[:, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(student.get_parameter("0.weight")[row, mask], solution[:-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(student.get_parameter("0.bias")[row], solution[-1], rtol=1e-3, atol=1e-4)


def test_a_convolutions_row_solves_the_damped_normal_equations():
    teacher, images = made(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False))), noise(30, 2, 5, 5) + 0.3
    masks, ridge = dropped(teacher), 0.1
    student, _done = repaired(teacher, masks, images, ridge=ridge)
    x = F.unfold(images, 3).transpose(1, 2).reshape(-1, 18).double()
    gram = x.T @ x / len(x)  # about zero: without a bias the layer cannot add a constant
    damping = ridge * gram.diagonal().mean()
    for row, mask in enumerate(masks["0.weight"].flatten(1)):
        dense = teacher.get_parameter("0.weight")[row].flatten().double()
        right = gram[mask] @ dense + damping * dense[mask]
        solution = torch.linalg.solve(gram[mask][:, mask] + damping * torch.eye(int(mask.sum())), right)
        found = student.get_parameter("0.weight")[row].flatten()
        torch.testing.assert_close(found[mask].double(), solution, rtol=1e-4, atol=1e-5)
        assert not found[~mask].any()


def test_rows_solved_in_several_parts_are_those_solved_at_once(monkeypatch):
    teacher, images = made(nn.Sequential(nn.Linear(9, 20))), noise(100, 9)
    masks = dropped(teacher)
    whole, _done = repaired(teacher, masks, images)
    monkeypatch.setattr(least_squares, "SOLVED_AT_ONCE", 100)
    parts, _done = repaired(teacher, masks, images)
    torch.testing.assert_close(parts.get_parameter("0.weight"), whole.get_parameter("0.weight"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_repaired_layer_is_nearer_to_the_teacher_and_its_zeros_stay(kind):
    layer, shape = KINDS[kind]
    teacher = made(nn.Sequential(deepcopy(layer)))
    images = noise(NUM_IMAGES, *shape[1:]) + 0.5
    masks = dropped(teacher)
    before = error(pruned(teacher, masks), teacher, images)
    student, done = repaired(teacher, masks, images)
    assert done == layerwise.Done(NUM_IMAGES)
    assert error(student, teacher, images) < 0.999 * before
    weight = student.get_parameter("0.weight")
    assert torch.equal(weight == 0, ~masks["0.weight"])


# ---- networks --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual sum, spelled in one of several ways."""

    def __init__(self, spelling: str, norm: bool = True):
        super().__init__()
        norms = [nn.BatchNorm2d(width) if norm else nn.Identity() for width in (16, 6, 6)]
        bias = not norm
        self.first, self.norm_first = nn.Conv2d(4, 16, 3, padding=1, bias=bias), norms[0]
        self.last, self.norm_last = nn.Conv2d(16, 6, 3, padding=1, bias=bias), norms[1]
        self.short, self.norm_short = nn.Conv2d(4, 6, 1, bias=bias), norms[2]
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_short(self.short(x)) if self.spelling != "identity" else torch.cat([x, x[:, :2]], dim=1)
        z = F.relu(self.norm_first(self.first(x)))
        z = self.norm_last(self.last(z))
        match self.spelling:
            case "iadd":
                z += y
            case "iadd to the other":
                y += z
                z = y
            case "add_":
                z = z.add_(y)
            case "torch.add":
                z = torch.add(y, z)
            case "method":
                z = y.add(z)
            case _:
                z = z + y
        return F.relu(z)


SPELLINGS = ["plus", "identity", "iadd", "iadd to the other", "add_", "torch.add", "method"]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_layer_that_ends_a_residual_sum_is_recognised(spelling, norm):
    network = made(Block(spelling, norm))
    plan = layerwise.look_at(network, noise(2, 4, 5, 5))
    calls = [plan.calls[index] for index in sorted(plan.calls)]
    order = [network.get_submodule(name) for name in ("norm_short", "norm_first", "norm_last")]
    order = order[1:] if spelling == "identity" else order
    assert [call.batch_norm for call in calls] == [layer if norm else None for layer in order]
    assert [call.skip is not None for call in calls] == [False] * (len(calls) - 1) + [True]
    assert calls[-1].skip is not None and calls[-1].skip < calls[-1].index


@pytest.mark.parametrize("change", ["x.relu_()", "x[:, 0] = 0.0", "x.view(-1).mul_(2)"])
def test_a_summand_that_changes_after_the_layer_has_run_is_no_part_of_its_target(change):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            exec(change, {"x": x})
            x += y
            return x

    network = made(Changes())
    calls = layerwise.look_at(network, noise(2, 4, 5, 5)).calls
    assert [call.skip for call in calls.values()] == [None, None]
    teacher, images = network, noise(NUM_IMAGES, 4, 5, 5)
    repaired(teacher, dropped(teacher), images)


def test_a_scaled_sum_and_one_of_other_shapes_are_not_taken_for_residual_sums():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            y = torch.add(self.a(x), self.b(x), alpha=0.5)
            return y + self.c(y).mean(dim=(2, 3), keepdim=True)

    network = made(Scaled())
    plan = layerwise.look_at(network, noise(2, 4, 5, 5))
    assert len(plan.calls) == 3 and all(call.skip is None for call in plan.calls.values())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("spelling", ["plus", "iadd", "iadd to the other"])
def test_the_sums_error_falls_below_that_of_the_plain_target(spelling, norm, monkeypatch):
    teacher, images = made(Block(spelling, norm)), noise(NUM_IMAGES, 4, 6, 6)
    masks = dropped(teacher)
    student, _done = repaired(teacher, masks, images)
    monkeypatch.setattr(layerwise.Look, "sum", lambda *_arguments: None)
    plain, _done = repaired(teacher, masks, images)
    own, others, unrepaired = (error(each, teacher, images) for each in (student, plain, pruned(teacher, masks)))
    assert own < 0.98 * others and own < unrepaired


def small(norm: bool = True) -> nn.Module:
    """Three layers, with or without BatchNorm."""
    return made(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=not norm),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
    )


SMALL_IMAGES = noise(NUM_IMAGES, 2, 6, 6, seed=5)


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 10.0])
def test_masks_of_ones_give_the_teacher_back(ridge):
    teacher = tiny_network().eval()
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in pruning.prunable(teacher).items()}
    images = 3 * noise(NUM_IMAGES, 1, 16, 16) + 1
    student, _done = repaired(teacher, masks, images, ridge)
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        scale = theirs[name].float().abs().max()
        assert float((tensor - theirs[name]).float().abs().max()) <= 1e-3 * scale, name
    assert sum(name.endswith("running_var") for name in theirs) == len(batchnorm.layers(teacher)) == 7


@pytest.mark.parametrize("norm", [True, False])
def test_a_network_is_repaired_with_batchnorm_or_without(norm):
    teacher, masks = small(norm), dropped(small(norm), 0.6)
    student, _done = repaired(teacher, masks, SMALL_IMAGES)
    others = noise(200, 2, 6, 6, seed=6)
    assert error(student, teacher, others) < 0.9 * error(pruned(teacher, masks), teacher, others)
    for name, weight in pruning.prunable(student).items():
        assert torch.equal(weight == 0, ~masks[name]), name


def test_the_same_images_give_the_same_bytes_and_another_order_nearly_so():
    teacher, masks = small(), dropped(small(), 0.6)
    first, again = (repaired(teacher, masks, SMALL_IMAGES)[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    shuffled = SMALL_IMAGES[torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1))]
    other = repaired(teacher, masks, shuffled)[0].state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("images", [torch.zeros(40, 2, 6, 6), torch.ones(40, 2, 6, 6), noise(3, 2, 6, 6)])
@pytest.mark.parametrize("norm", [True, False])
def test_a_layer_without_full_rank_stays_finite(images, norm):
    teacher = small(norm)
    with torch.no_grad():
        teacher.get_parameter("0.weight")[:5] = 0.0  # five channels that are constant for every image
    masks = dropped(teacher, 0.5)
    masks["3.weight"][0] = False  # a row that keeps nothing
    student, _done = repaired(teacher, masks, images)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert not student.get_parameter("3.weight")[0].any()
    with torch.no_grad():
        scale = float(teacher(images).abs().max())
        assert float((student(images) - teacher(images)).abs().max()) < 2 * scale


def test_dead_inputs_keep_the_teachers_weights():
    teacher, images = made(nn.Sequential(nn.Linear(6, 4))), noise(50, 6)
    images[:, [1, 4]] = 0.0
    masks = dropped(teacher, 0.3)
    student, _done = repaired(teacher, masks, images)
    expected = (teacher.get_parameter("0.weight") * masks["0.weight"])[:, [1, 4]]
    torch.testing.assert_close(student.get_parameter("0.weight")[:, [1, 4]], expected)


class Twice(nn.Module):
    """One module used twice, or two modules with one weight."""

    def __init__(self, one_module: bool):
        super().__init__()
        self.a, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b = self.a if one_module else nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.norm(self.b(x)))
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("one_module", [True, False])
def test_a_shared_weight_stays_shared_and_is_repaired(one_module):
    teacher, images = made(Twice(one_module)), noise(NUM_IMAGES, 4, 5, 5)
    masks = dropped(teacher, 0.5)
    assert list(masks) == ["a.weight", "head.weight"]
    student, _done = repaired(teacher, masks, images)
    assert student.get_submodule("a").weight is student.get_submodule("b").weight
    assert torch.equal(student.get_parameter("a.weight") == 0, ~masks["a.weight"])
    assert error(student, teacher, images) < error(pruned(teacher, masks), teacher, images)


def test_masks_of_ones_keep_a_layer_that_runs_twice():
    teacher, images = made(Twice(True)), noise(NUM_IMAGES, 4, 5, 5)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in pruning.prunable(teacher).items()}
    student, _done = repaired(teacher, masks, images)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, teacher.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_autocast_around_it_changes_nothing():
    teacher, masks = small(), dropped(small(), 0.6)
    plain, _done = repaired(teacher, masks, SMALL_IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        teacher(SMALL_IMAGES[:2])  # autocast keeps copies of weights that need a gradient
        student = pruned(teacher, masks)
        student(SMALL_IMAGES[:2])
        layerwise.reconstruct(student, teacher, lambda n: SMALL_IMAGES[:n], NUM_IMAGES, masks)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_the_teacher_is_left_bit_identical_and_both_end_in_eval_mode():
    teacher, masks = small(), dropped(small(), 0.6)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = pruned(teacher, masks).train()
    layerwise.reconstruct(student, teacher, lambda n: SMALL_IMAGES[:n], NUM_IMAGES, masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(module.training for network in (student, teacher) for module in network.modules())


def test_where_memory_is_small_fewer_images_are_used(monkeypatch):
    teacher, masks = small(), dropped(small())
    largest = 4 * 8 * 6 * 6  # bytes of the first convolution's output
    assert layerwise.look_at(teacher, SMALL_IMAGES[:2]).largest == largest
    for memory, expected in ((1, 16), (2 * layerwise.LIVE * largest * 20, 20), (1 << 30, NUM_IMAGES)):
        monkeypatch.setattr(layerwise, "MEMORY", memory)
        assert repaired(teacher, masks, SMALL_IMAGES)[1].num_images == expected


def test_a_layer_whose_matrix_is_too_large_keeps_the_teachers_weights_and_is_named(monkeypatch):
    teacher, masks = small(), dropped(small(), 0.6)
    monkeypatch.setattr(moments, "LARGEST", 8 * 2 * 36**2)  # of the second convolution; the linear layer has 32 inputs
    assert repaired(teacher, masks, SMALL_IMAGES)[1].too_large == ()
    monkeypatch.setattr(moments, "LARGEST", 8 * 2 * 36**2 - 1)
    student, done = repaired(teacher, masks, SMALL_IMAGES)
    assert done.too_large == ("3.weight",)
    monkeypatch.undo()
    monkeypatch.setattr(layerwise, "MOST_OPERATIONS", 0.0)
    assert len(repaired(teacher, masks, SMALL_IMAGES)[1].too_large) == len(masks), "rows that take too long"
    assert torch.equal(student.get_parameter("3.weight"), teacher.get_parameter("3.weight") * masks["3.weight"])
    assert error(student, teacher, SMALL_IMAGES) < error(pruned(teacher, masks), teacher, SMALL_IMAGES)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """Weight standardisation: another tensor in each pass."""

    def forward(self, input):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class Handwritten(nn.Linear):
    """A layer by a product, which is not seen as one."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


class Table(nn.Module):
    """A layer on a table of its own, as Swin's position bias has it."""

    def __init__(self, rows: int):
        super().__init__()
        self.table, self.inner = nn.Parameter(torch.randn(rows, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return x + self.inner(self.table).square().mean(dim=0)


class Tires(nn.Module):
    """A network that takes a few images only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.a(x)
        if len(x) > NUM_IMAGES:
            raise RuntimeError("no luck\nthis time")
        return self.b(x)


class Turns(nn.Module):
    """Does more on large batches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x.abs() if len(x) > 2 else x))


class Mixes(nn.Module):
    """Adds the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x) + self.a(x).mean(dim=0)


def on_images(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.Flatten(), nn.Linear(4 * 2 * 2, 3))


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (on_images(Standardised(4, 4, 3)), "logits change"),
        (on_images(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), Handwritten(16, 16))), "logits change"),
        (nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten(), Table(1)), "inner.weight has an input of 1 in a batch of 96"),
        (nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten(), Table(2 * NUM_IMAGES)), "logits change"),
        (nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten(), Tires()), "no luck this time"),
        (nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten(), Turns()), "2.a.weight runs at another place"),
        (nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten(), Mixes()), "logits change"),
        (nn.Sequential(nn.Flatten(), Handwritten(72, 3)), "logits change"),
    ],
    ids=["standardised", "handwritten", "table", "long table", "tires", "turns", "mixes", "nothing seen"],
)
def test_a_network_that_cannot_run_beside_its_teacher_is_refused_and_left_as_it_was(network, says):
    teacher = made(network)
    masks = dropped(teacher, 0.5)
    student = pruned(teacher, masks)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    images = noise(NUM_IMAGES, 2, 6, 6)
    refusal(lambda: layerwise.reconstruct(student, teacher, lambda n: images[:n], NUM_IMAGES, masks), says)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_parametrised_layer_is_refused_before_anything_changes():
    teacher = made(on_images(nn.Conv2d(4, 4, 3)))
    masks = dropped(teacher, 0.5)
    student = pruned(teacher, masks)
    for network in (student, teacher):
        torch.nn.utils.parametrizations.weight_norm(network.get_submodule("1"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    images = noise(NUM_IMAGES, 2, 6, 6)
    call = lambda: layerwise.reconstruct(student, teacher, lambda n: images[:n], NUM_IMAGES, masks)  # noqa: E731
    refusal(call, "computes its weight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_statistics_that_would_not_be_finite_are_refused():
    teacher = small()
    with torch.no_grad():
        teacher.get_buffer("1.running_var").fill_(3e38)
        batchnorm.layers(teacher)[0].eps = 0.0
    images = SMALL_IMAGES * 1e-25
    masks = dropped(teacher, 0.5)
    student = pruned(teacher, masks)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    refusal(lambda: layerwise.reconstruct(student, teacher, lambda n: images[:n], NUM_IMAGES, masks), "not be finite")
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


# ---- criteria that reach it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["global_magnitude", "lamp", "erk"])
def test_a_residual_network_is_repaired_whatever_chose_the_masks(criterion):
    teacher, images = tiny_network().eval(), noise(NUM_IMAGES, 1, 16, 16)
    masks = pruning.masks(teacher, PruningConfig(criterion=criterion, sparsity=0.8))
    student, _done = repaired(teacher, masks, images)
    reestimated = pruned(teacher, masks)
    batchnorm.reestimate(reestimated, [images])
    others = noise(100, 1, 16, 16, seed=9)
    errors = [error(each, teacher, others) for each in (student, reestimated)]
    assert errors[0] < 0.8 * errors[1]
