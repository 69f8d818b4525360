import copy
import itertools

import pytest
import torch
from torch import nn

from dfkd_ray.compression import pruning
from dfkd_ray.compression.pruning import CRITERIA
from dfkd_ray.config import PruningConfig
from helpers import tiny_network


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
    flat = torch.cat([mask.flatten() for mask in pruning.masks(network, PruningConfig(sparsity=0.25)).values()])
    num_zeros = round(0.25 * total(network))
    assert not flat[:num_zeros].any() and flat[num_zeros:].all()


def test_global_magnitude_drops_the_smallest_weights_of_all():
    network = fill(tiny_network(), "random")
    masks = pruning.masks(network, PruningConfig(sparsity=0.7))
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
    for name, score in pruning.lamp_scores(weights).items():
        torch.testing.assert_close(score, slow_lamp(weights[name].double()), rtol=1e-9, atol=0)


def test_lamp_scores_are_blind_to_a_layers_scale():
    weight = torch.randn(40, generator=torch.Generator().manual_seed(0))
    scores = pruning.lamp_scores({"a": weight, "b": weight * 2**-30})
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
