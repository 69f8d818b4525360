import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfkd_ray
from dfkd_ray import models
from dfkd_ray.compression import computed_weights, moments, pruning, saliency
from dfkd_ray.compression.pruning import CRITERIA
from dfkd_ray.config import FROM_IMAGES, PruningConfig, validate
from helpers import refusal, tiny_network


def total(network):
    return sum(weight.numel() for weight in pruning.prunable(network).values())


def fill(network, kind):
    """Weights with no ties, with many, or all equal."""
    for seed, weight in enumerate(pruning.prunable(network).values()):
        values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.data = {"random": values, "rounded": (values * 2).round() + 0.5, "equal": torch.ones_like(values)}[kind]
    return network


def zeros_of(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["random", "rounded", "equal"])
@pytest.mark.parametrize("sparsity", [0.0, 0.333, 0.5, 0.9, 0.987])
def test_every_criterion_reaches_the_exact_count_of_zeros(criterion, kind, sparsity):
    network = fill(tiny_network(), kind)
    masks = pruning.masks(network, PruningConfig(criterion=criterion, sparsity=sparsity))
    pruning.apply(network, masks)
    expected = round(sparsity * total(network))
    assert zeros_of(masks) == expected
    assert pruning.achieved_sparsity(network) == expected / total(network)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_spared_layers_stay_dense_and_the_others_make_up_for_them(criterion, kind):
    network = fill(tiny_network(), kind)
    config = PruningConfig(criterion=criterion, sparsity=0.8, spare_first=True, spare_last=True)
    masks = pruning.masks(network, config)
    assert masks["conv1.weight"].all() and masks["fc.weight"].all()
    assert zeros_of(masks) == round(0.8 * total(network))


@pytest.mark.parametrize(("spared", "other"), [("spare_first", "fc.weight"), ("spare_last", "conv1.weight")])
def test_one_layer_can_be_spared_alone(spared, other):
    masks = pruning.masks(fill(tiny_network(), "random"), PruningConfig.model_validate({"sparsity": 0.9, spared: True}))
    dense = {name for name, mask in masks.items() if mask.all()}
    assert dense == ({"conv1.weight", "fc.weight"} - {other})


def test_more_zeros_than_unspared_weights_are_refused_with_the_numbers():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 5))  # 18 and 10 weights
    with pytest.raises(ValueError, match=r"20 of 28 weights must go, but only 10 are not spared"):
        pruning.masks(network, PruningConfig(sparsity=0.7, spare_first=True))


def test_a_network_with_nothing_to_prune_is_refused():
    with pytest.raises(ValueError, match="no Conv or Linear weight"):
        pruning.masks(nn.BatchNorm2d(3), PruningConfig(sparsity=0.5))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ties_are_broken_by_position_and_so_the_same_each_time(criterion):
    network = fill(tiny_network(), "rounded")
    config = PruningConfig(criterion=criterion, sparsity=0.6)
    first, again = pruning.masks(network, config), pruning.masks(copy.deepcopy(network), config)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_of_equal_weights_the_first_ones_go():
    network = fill(tiny_network(), "equal")
    config = PruningConfig(criterion="global_magnitude", sparsity=0.25)
    flat = torch.cat([mask.flatten() for mask in pruning.masks(network, config).values()])
    num_zeros = round(0.25 * total(network))
    assert not flat[:num_zeros].any() and flat[num_zeros:].all()


def test_global_magnitude_drops_the_smallest_weights_of_all():
    network = fill(tiny_network(), "random")
    masks = pruning.masks(network, PruningConfig(criterion="global_magnitude", sparsity=0.7))
    weights = pruning.prunable(network)
    dropped = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
    kept = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    assert dropped.max() <= kept.min()


def test_uniform_takes_the_same_share_of_every_layer_and_its_smallest_weights():
    network = fill(tiny_network(), "random")
    masks = pruning.masks(network, PruningConfig(criterion="uniform", sparsity=0.7))
    for name, weight in pruning.prunable(network).items():
        mask = masks[name]
        assert abs(int((~mask).sum()) - 0.7 * mask.numel()) < 1
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def slow_lamp(weight):
    """w² over the sum of squares of this and every later weight, in ascending order of magnitude."""
    values = weight.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: values[i] ** 2)
    scores = [0.0] * len(values)
    for rank, i in enumerate(order):
        scores[i] = values[i] ** 2 / sum(values[j] ** 2 for j in order[rank:])
    return torch.tensor(scores, dtype=torch.float64).view_as(weight)


def test_lamp_scores_equal_a_slow_reference():
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(6, 3, 3, 3, generator=generator), "b": torch.randn(5, 7, generator=generator) * 1e-4}
    for name, score in pruning.lamp_scores(pruning.squares(weights)).items():
        torch.testing.assert_close(score, slow_lamp(weights[name].double()), rtol=1e-9, atol=0)


def test_lamp_scores_are_blind_to_a_layers_scale():
    weight = torch.randn(40, generator=torch.Generator().manual_seed(0))
    scores = pruning.lamp_scores(pruning.squares({"a": weight, "b": weight * 2**-30}))
    torch.testing.assert_close(scores["a"], scores["b"], rtol=1e-9, atol=0)


def layer_sizes(network, criterion, sparsity):
    masks = pruning.masks(network, PruningConfig(criterion=criterion, sparsity=sparsity))
    return [int(mask.sum()) for mask in masks.values()]


def test_lamp_empties_no_layer():
    network = fill(tiny_network(), "random")
    network.get_parameter("conv1.weight").data *= 1e-6
    sparsity = 1 - 10 / total(network)  # ten weights stay in eight layers
    assert len(pruning.prunable(network)) == 8
    assert min(layer_sizes(network, "global_magnitude", 0.5)) == 0
    assert min(layer_sizes(network, "lamp", sparsity)) >= 1
    assert sum(layer_sizes(network, "lamp", sparsity)) == 10


# ---- ERK -------------------------------------------------------------------------------------------------------------

SHAPES = {
    "resnet": {"a": (8, 1, 3, 3), "b": (8, 8, 3, 3), "c": (32, 16, 3, 3), "d": (32, 16, 1, 1), "e": (10, 32)},
    "linear": {"a": (300, 20), "b": (20, 20), "c": (3, 20)},
    "one": {"a": (7, 11)},
    "tiny": {"a": (1, 1), "b": (1, 1, 1, 1), "c": (2, 3)},
    "3-D": {"a": (4, 2, 3, 3, 3), "b": (4, 1, 5), "c": (64, 64)},
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_erk_keeps_the_exact_number_in_shares_of_its_formula(shapes):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    size = sum(weight.numel() for weight in weights.values())
    for num_zeros in sorted({0, 1, size - 1, size, *range(0, size, max(1, size // 37))}):
        masks = pruning.erk(weights, num_zeros)
        assert zeros_of(masks) == num_zeros
        densities = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
        ratios = {name: sum(shape) / weights[name].numel() for name, shape in shapes.items()}
        largest = max(weights, key=lambda name: weights[name].numel())
        open_layers = [name for name in weights if densities[name] < 1 and name != largest]
        for name, other in itertools.pairwise(open_layers):  # each count is rounded down: one weight less at most
            share, other_share = (densities[each] / ratios[each] for each in (name, other))
            slack = sum(1 / (weights[each].numel() * ratios[each]) for each in (name, other))
            assert abs(share - other_share) <= slack + 1e-9
        for name, mask in masks.items():
            weight = weights[name].abs()
            if 0 < densities[name] < 1:
                assert weight[~mask].max() <= weight[mask].min()


def test_erk_by_hand():
    weights = {"a": torch.arange(1.0, 101).view(10, 10), "b": torch.arange(1.0, 13).view(4, 3)}
    # Ratios are 20/100 and 7/12, of 27 units of kept weights: with 27 kept of 112, 20 and 7.
    masks = pruning.erk(weights, 112 - 27)
    assert [int(mask.sum()) for mask in masks.values()] == [20, 7]
    # With 54 kept, b would keep 14 of 12: it stays dense, and a keeps the other 42.
    masks = pruning.erk(weights, 112 - 54)
    assert masks["b"].all() and int(masks["a"].sum()) == 42
    assert torch.equal(masks["a"].flatten(), torch.arange(100) >= 58)


def test_erk_empties_no_layer_of_a_resnet8_at_a_sparsity_of_98_percent():
    assert min(layer_sizes(fill(tiny_network(), "random"), "erk", 0.98)) >= 1


# ---- scores from images ----------------------------------------------------------------------------------------------


def one_linear(weights):
    network = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    network.get_parameter("0.weight").data = torch.tensor([weights])
    return network


def images_with(moments):
    """Images (n, d) whose second moments about zero are these."""
    factor = torch.linalg.cholesky(torch.tensor(moments, dtype=torch.float64))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(moments))), dtype=torch.float64)
    return (signs @ factor.T).float()


CORRELATED = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]]


def test_obs_drops_one_of_two_correlated_inputs_before_a_smaller_weight(monkeypatch):
    monkeypatch.setattr(saliency, "DAMPING", 1e-9)
    network = one_linear([0.95, 1.0, 1.0])
    scores = saliency.saliencies(network, images_with(CORRELATED), "obs")
    torch.testing.assert_close(scores["0.weight"], torch.tensor([[0.9025, 0.19, 0.19]]).double(), rtol=1e-5, atol=0)
    wanda = saliency.saliencies(network, images_with(CORRELATED), "wanda")["0.weight"]
    torch.testing.assert_close(wanda, torch.tensor([[0.9025, 1.0, 1.0]]).double(), rtol=1e-5, atol=0)
    for criterion, dropped in (("obs", (1, 2)), ("wanda", (0,))):
        found = saliency.saliencies(network, images_with(CORRELATED), criterion)
        config = PruningConfig.model_validate({"criterion": criterion, "sparsity": 1 / 3})
        (mask,) = pruning.masks(network, config, saliencies=found).values()
        assert [int(index) for index in (~mask).flatten().nonzero()] in [[each] for each in dropped]


def test_the_damping_of_obs_is_a_share_of_the_mean_power():
    network = one_linear([0.95, 1.0, 1.0])
    inverse = torch.linalg.inv(torch.tensor(CORRELATED).double() + saliency.DAMPING * torch.eye(3))
    expected = torch.tensor([[0.95, 1.0, 1.0]]).double().square() / inverse.diagonal()
    found = saliency.saliencies(network, images_with(CORRELATED), "obs")["0.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_wanda_is_the_squared_weight_times_the_mean_squared_input():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 25, 4))
    images = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0)) + 1
    scores = saliency.saliencies(network, images, "wanda")
    weights = pruning.prunable(network)
    assert list(scores) == list(weights)
    power = nn.functional.unfold(images, 3, padding=1).square().mean(dim=(0, 2)).view(1, 2, 3, 3)
    expected = weights["0.weight"].double().square() * power
    torch.testing.assert_close(scores["0.weight"], expected, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        inner = network[:3](images).square().mean(dim=0)
    torch.testing.assert_close(scores["3.weight"], weights["3.weight"].double().square() * inner, rtol=1e-4, atol=1e-7)


LAYERS = {
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 6, 6)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 6, 6)),
    "1-D": (nn.Conv1d(4, 6, 3), (4, 9)),
    "tokens": (nn.Linear(5, 3), (4, 5)),
}


@pytest.mark.parametrize("criterion", FROM_IMAGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_scores_from_images_have_the_weights_shape_and_weigh_its_own_inputs(criterion, kind):
    layer, shape = LAYERS[kind]
    network = fill(nn.Sequential(copy.deepcopy(layer)), "random")
    images = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    axis = 1 if kind == "tokens" else 0
    images.select(axis + 1, 0).zero_()  # the first input is dead
    scores = saliency.saliencies(network, images, criterion)["0.weight"]
    weight = network.get_parameter("0.weight")
    assert scores.shape == weight.shape and scores.dtype == torch.float64 and (scores >= 0).all()
    with torch.no_grad():
        before = network(images)
        weight[scores < 1e-2 * scores.mean()] = 0.0  # what the dead input meets, and hardly more
        assert int((weight == 0).sum()) > 0
        assert float((network(images) - before).abs().max()) < 0.5 * float(before.abs().max())


@pytest.mark.parametrize("criterion", FROM_IMAGES)
@pytest.mark.parametrize("sparsity", [0.333, 0.9, 0.98])
def test_scores_from_images_give_the_exact_number_of_zeros_and_empty_no_layer(criterion, sparsity):
    network = fill(tiny_network(), "random")
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = saliency.saliencies(network, images, criterion)
    config = PruningConfig.model_validate({"criterion": criterion, "sparsity": sparsity, "spare_last": True})
    masks = pruning.masks(network, config, saliencies=scores)
    assert zeros_of(masks) == round(sparsity * total(network))
    assert masks["fc.weight"].all() and all(mask.any() for mask in masks.values())


@pytest.mark.parametrize("criterion", FROM_IMAGES)
def test_layers_whose_inputs_are_not_seen_are_left_out(criterion, monkeypatch):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(8, 8), nn.Linear(3, 3)
            self.attention, self.large = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x)
            return self.large(self.attention(x, x, x, need_weights=False)[0])

    images = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    assert set(saliency.saliencies(Attends(), images, criterion)) == {"a.weight", "large.weight"}
    monkeypatch.setattr(moments, "LARGEST", 8 * 7 * 7)
    assert saliency.saliencies(Attends(), images, criterion) == {}


@pytest.mark.parametrize("criterion", FROM_IMAGES)
def test_scores_from_images_and_the_cubic_schedule_are_refused_in_one_line(criterion):
    data = {"criterion": criterion, "sparsity": 0.5, "schedule": "cubic"}
    refusal(lambda: validate(PruningConfig, data), f"criterion={criterion}", "schedule=one_shot")


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_once_dropped_stay_dropped_at_a_higher_sparsity(criterion):
    network = fill(tiny_network(), "random")
    config = PruningConfig(criterion=criterion, sparsity=0.9)
    early = pruning.masks(network, config, sparsity=0.5)
    pruning.apply(network, early)
    late = pruning.masks(network, config)
    assert zeros_of(late) == round(0.9 * total(network)) > zeros_of(early)
    assert not any((late[name] & ~early[name]).any() for name in late)


def test_choosing_masks_changes_no_weight_and_applying_them_changes_only_the_dropped():
    network = fill(tiny_network(), "random")
    before = copy.deepcopy(network.state_dict())
    masks = pruning.masks(network, PruningConfig(sparsity=0.5))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    pruning.apply(network.requires_grad_(False), masks)
    for name, tensor in network.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(tensor, expected)


def test_masks_name_weights_as_the_state_dict_does():
    network = tiny_network()
    masks = pruning.masks(network, PruningConfig(sparsity=0.5))
    state = network.state_dict()
    assert set(masks) == {name for name, tensor in state.items() if tensor.ndim in (2, 4)}
    assert all(mask.shape == state[name].shape and mask.dtype == torch.bool for name, mask in masks.items())


def test_a_shared_weight_is_counted_once():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    assert list(pruning.prunable(network)) == ["0.weight"]
    pruning.apply(network, pruning.masks(network, PruningConfig(sparsity=0.5)))
    assert pruning.achieved_sparsity(network) == 0.5


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2), nn.Linear(4, 5)],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_convolution_and_linear_layer_is_pruned(layer):
    pruning.apply(layer, pruning.masks(layer, PruningConfig(sparsity=0.5)))
    assert int((layer.weight == 0).sum()) == round(0.5 * layer.weight.numel())
    assert (layer.bias != 0).all()


class Standardised(nn.Conv2d):
    def forward(self, input):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (self.weight.std((1, 2, 3), keepdim=True))
        return F.conv2d(input, weight, self.bias)


class Normalised(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, F.normalize(self.weight.to(torch.float64), dim=1).float(), self.bias)


class Blurred(nn.Conv2d):
    def forward(self, input):
        return super().forward(F.conv2d(input, torch.ones(input.shape[1], 1, 1, 1), groups=input.shape[1]))


def test_a_layer_whose_zeros_are_none_in_what_it_computes_with_is_refused():
    image = torch.zeros(1, 4, 8, 8)
    network = nn.Sequential(nn.Conv2d(4, 4, 1), Standardised(4, 8, 3), Standardised(8, 8, 3)).train()
    before = copy.deepcopy(network.state_dict())
    refusal(lambda: computed_weights.refuse(network, image), "layer 1 and 1 more computes its weight in forward")
    assert network.training and not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    fine = nn.Sequential(nn.Conv2d(4, 4, 1), Normalised(4, 8, 3), Blurred(8, 8, 3), nn.ConvTranspose2d(8, 4, 3))
    computed_weights.refuse(fine.to(memory_format=torch.channels_last), image)
    computed_weights.refuse(nn.Linear(8, 2), torch.zeros(1, 8))


def test_networks_of_standardised_weights_are_refused():
    network = models.build("timm:test_nfnet", {}, num_classes=10, image_shape=(3, 32, 32))
    refusal(lambda: computed_weights.refuse(network, torch.zeros(1, 3, 32, 32)), "computes its weight in forward")


@pytest.mark.parametrize(
    "fields", [{"pruning.sparsity": 0.5}, {"pruning.structure": "n_of_m", "pruning.sparsity": 0.5}]
)
def test_a_trial_refuses_such_a_layer_before_anything_is_made(fields):
    network = nn.Sequential(
        Standardised(1, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    about = {"input_shape": (1, 8, 8), "num_classes": 3, "mean": 0.5, "std": 0.25, "progress": False}
    refusal(lambda: dfkd_ray.recover(network, settings=fields, **about), "computes its weight in forward")


def test_non_zero_parameters_include_biases_and_batchnorm():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))  # 6 + 3 weights and biases, 3 ones, 3 zeros
    nn.init.ones_(network.get_parameter("0.bias"))
    nn.init.ones_(network.get_parameter("0.weight"))
    network.get_parameter("0.weight").data[0, 0] = 0
    assert pruning.num_nonzero(network) == 5 + 3 + 3
    assert pruning.achieved_sparsity(network) == 1 / 6


def test_the_cubic_schedule_rises_from_zero_to_the_end_and_stays_there():
    values = [pruning.cubic_sparsity(step, 100, 0.5, 0.9) for step in range(101)]
    assert values[0] == 0
    assert values[50:] == [0.9] * 51
    assert all(a < b for a, b in itertools.pairwise(values[:51]))
    assert values[25] == pytest.approx(0.9 * (1 - 0.5**3))


@pytest.mark.parametrize(("num_steps", "end"), [(0, 0.5), (1, 0.1), (1, 1.0)])
def test_the_cubic_schedule_of_a_tiny_run_ends_at_full_sparsity(num_steps, end):
    assert pruning.cubic_sparsity(max(1, num_steps), num_steps, end, 0.9) == 0.9
