import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd_ray import batchnorm, losses, models
from dfkd_ray.bundles import freeze
from helpers import randomise_statistics, tiny_network

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def slow_moments(x):
    """Mean and biased variance per channel in float64."""
    channels = x.double().transpose(0, 1).flatten(1)
    mean = channels.mean(dim=1)
    return mean.float(), (channels - mean[:, None]).square().mean(dim=1).float()


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 4, 5), (1, 3, 4, 4), (2, 1, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_equal_a_slow_reference(shape, dtype):
    x = (normal(*shape) * 2 + 1).to(dtype)
    mean, variance = batchnorm.channel_moments(x)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close((mean, variance), slow_moments(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_do_not_depend_on_the_memory_format(dtype):
    x = normal(8, 16, 9, 9).to(dtype)
    strided = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batchnorm.channel_moments(strided), batchnorm.channel_moments(x), rtol=1e-5, atol=1e-6)


def test_the_variance_survives_a_large_mean():
    mean, variance = batchnorm.channel_moments(normal(64, 2, 8, 8) + 1000)
    torch.testing.assert_close(mean, torch.full((2,), 1000.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(variance, torch.ones(2), rtol=0.1, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_channel_affine_map_equals_broadcasting(dtype, tolerance):
    x, scale, shift = normal(3, 4, 5, 5).to(dtype), normal(4, seed=1), normal(4, seed=2)
    result = batchnorm.channel_affine(x, scale, shift)
    expected = x.float() * scale.view(1, 4, 1, 1) + shift.view(1, 4, 1, 1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)


LAYERS = {
    "1d": (nn.BatchNorm1d, (16, 6)),
    "1d_long": (nn.BatchNorm1d, (4, 6, 7)),
    "2d": (nn.BatchNorm2d, (4, 6, 5, 5)),
    "3d": (nn.BatchNorm3d, (3, 6, 2, 3, 4)),
}


def layer_for(name, **options):
    kind, shape = LAYERS[name]
    layer = kind(6, **options).eval()
    randomise_statistics(layer)
    return layer.requires_grad_(False), shape


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_fused_layer_gives_values_and_gradients_of_autograd(name, affine):
    layer, shape = layer_for(name, affine=affine)
    cotangents = normal(*shape, seed=1), normal(6, seed=2), normal(6, seed=3)
    results = []
    for forward in (lambda x: batchnorm.fused(x, layer), lambda x: (layer(x), *autograd_moments(x))):
        x = normal(*shape).requires_grad_()
        outputs = forward(x)
        torch.stack([(a * b).sum() for a, b in zip(outputs, cotangents, strict=True)]).sum().backward()
        results.append((*[output.detach() for output in outputs], x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def autograd_moments(x):
    dims = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x.float(), dim=dims, correction=0)
    return mean, variance


def test_a_fused_layer_without_bias_equals_the_layer():
    layer, shape = layer_for("2d")
    layer.register_parameter("bias", None)
    x = normal(*shape)
    torch.testing.assert_close(batchnorm.fused(x, layer)[0], layer(x))


def teacher_and_images(memory_format):
    torch.manual_seed(0)
    network = models.build("resnet20", {"width_multiplier": 0.5}, num_classes=10, image_shape=(3, 16, 16))
    randomise_statistics(network)
    freeze(network)
    images = normal(8, 3, 16, 16).contiguous(memory_format=memory_format)
    return network.to(memory_format=memory_format), images


def gradient(network, images, statistics_of, autocast):
    """Gradient of cross-entropy + 10 BatchNorm distance; `statistics_of` runs the network."""
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, found = statistics_of(network, x)
    terms = [losses.batchnorm_distance(m, v, layer.running_mean, layer.running_var) for m, v, layer in found]
    loss = F.cross_entropy(logits.float(), torch.arange(8)) + 10 * sum(terms)
    loss.backward()
    return loss.item(), len(found), x.grad


def by_hooks(network, x):
    """The published way: forward hooks that reduce each layer's input."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, _: found.append((*autograd_moments(inputs[0]), layer)))
        for layer in batchnorm.layers(network)
    ]
    logits = network(x)
    for hook in hooks:
        hook.remove()
    return logits, found


def by_fusing(network, x):
    with batchnorm.recorded(network) as statistics:
        logits = network(x)
    return logits, list(zip(statistics.means, statistics.variances, statistics.layers, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.1)], ids=["float32", "bfloat16"])
def test_fused_batchnorm_gives_the_gradients_of_hooks(memory_format, autocast, tolerance):
    network, images = teacher_and_images(FORMATS[memory_format])
    expected_loss, num_layers, expected = gradient(network, images, by_hooks, autocast)
    loss, num_found, result = gradient(network, images, by_fusing, autocast)
    assert num_found == num_layers == 19
    assert loss == pytest.approx(expected_loss, rel=tolerance / 10)
    assert relative(result, expected) < tolerance


def test_the_statistics_term_reaches_the_gradient():
    network, images = teacher_and_images(torch.contiguous_format)

    def without(network, x):
        return network(x), []

    _, _, plain = gradient(network, images, without, False)
    _, _, full = gradient(network, images, by_fusing, False)
    assert relative(full, plain) > 0.1


def test_bfloat16_statistics_are_float32():
    network, images = teacher_and_images(torch.channels_last)
    with batchnorm.recorded(network) as statistics, torch.autocast("cpu", torch.bfloat16):
        network(images)
    assert {tensor.dtype for tensor in statistics.means + statistics.variances} == {torch.float32}


def test_recording_changes_neither_output_nor_state_of_the_network():
    network = freeze(tiny_network())
    before = copy.deepcopy(network.state_dict())
    images = normal(4, 1, 16, 16)
    expected = network(images)
    with batchnorm.recorded(network):
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_statistics_come_in_the_order_the_layers_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.second(self.first(x) + 100)

    network = Backwards().eval()
    x = normal(8, 3)
    with batchnorm.recorded(network) as statistics:
        network(x)
    assert statistics.layers == [network.first, network.second]
    torch.testing.assert_close(statistics.means[0], x.mean(dim=0))
    assert (statistics.means[1] > 90).all()


def test_cleared_statistics_hold_the_next_pass_only():
    network = freeze(tiny_network())
    num_layers = len(batchnorm.layers(network))
    with batchnorm.recorded(network) as statistics:
        for seed in range(2):
            statistics.clear()
            network(normal(4, 1, 16, 16, seed=seed))
    assert len(statistics.means) == len(statistics.variances) == len(statistics.layers) == num_layers


def test_layers_are_restored_after_an_error():
    network = freeze(tiny_network())

    def record_and_fail():
        with batchnorm.recorded(network):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        record_and_fail()
    assert not any("forward" in vars(layer) for layer in batchnorm.layers(network))


def test_a_network_without_running_statistics_is_refused():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert batchnorm.layers(network) == []
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"), batchnorm.recorded(network):
        pass


def test_a_network_in_train_mode_is_refused():
    with pytest.raises(AssertionError), batchnorm.recorded(tiny_network().train()):
        pass


def test_reestimated_statistics_are_the_mean_over_batches():
    network = nn.Sequential(nn.BatchNorm1d(3))
    network.get_buffer("0.num_batches_tracked").fill_(50)  # as after training
    batches = [normal(6, 3, seed=1) * 2 + 1, normal(10, 3, seed=2), normal(4, 3, seed=3) - 5]
    batchnorm.reestimate(network, batches)
    mean = sum(batch.mean(dim=0) for batch in batches) / 3
    variance = sum(batch.var(dim=0, correction=1) for batch in batches) / 3
    torch.testing.assert_close(network[0].running_mean, mean)
    torch.testing.assert_close(network[0].running_var, variance)


class PassesItsMomentum(nn.BatchNorm1d):
    def forward(self, input):
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(input, *given, self.training, self.momentum, self.eps)  # type: ignore[arg-type]


def test_reestimation_suits_a_layer_that_computes_batchnorm_itself():
    networks = [nn.Sequential(kind(3), nn.Linear(3, 3), kind(3)) for kind in (nn.BatchNorm1d, PassesItsMomentum)]
    networks[1].load_state_dict(networks[0].state_dict())
    batches = [normal(6, 3, seed=seed) for seed in range(3)]
    for network in networks:
        batchnorm.reestimate(network, batches)
    for name in ("0.running_mean", "0.running_var", "2.running_mean", "2.running_var"):
        torch.testing.assert_close(networks[1].get_buffer(name), networks[0].get_buffer(name), rtol=0, atol=0)


def test_reestimated_statistics_do_not_depend_on_the_old_ones():
    one, other = tiny_network(), tiny_network()
    randomise_statistics(other, seed=9)
    other.load_state_dict({k: v for k, v in one.state_dict().items() if "running" not in k}, strict=False)
    for layer in batchnorm.layers(other):
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.fill_(50)
    batches = [normal(8, 1, 16, 16, seed=seed) for seed in range(2)]
    assert not torch.equal(one.get_buffer("bn1.running_mean"), other.get_buffer("bn1.running_mean"))
    batchnorm.reestimate(one, batches)
    batchnorm.reestimate(other, iter(batches))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_reestimation_changes_statistics_alone_and_leaves_eval_mode():
    network = tiny_network().train()
    before = copy.deepcopy(network.state_dict())
    momenta = [layer.momentum for layer in batchnorm.layers(network)]
    batchnorm.reestimate(network, [normal(8, 1, 16, 16)])
    after = network.state_dict()
    changed = {name.rsplit(".", 1)[1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert not any(module.training for module in network.modules())
    assert [layer.momentum for layer in batchnorm.layers(network)] == momenta


def test_dropout_stays_off_while_statistics_are_reestimated():
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3))
    x = normal(8, 3)
    batchnorm.reestimate(network, [x])
    torch.testing.assert_close(network[1].running_mean, x.mean(dim=0))


def test_reestimating_on_nothing_is_refused_and_a_broken_iterator_leaves_eval_mode():
    network = tiny_network()
    with pytest.raises(ValueError, match="no batch"):
        batchnorm.reestimate(network, [])

    def broken():
        yield torch.rand(4, 1, 16, 16)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        batchnorm.reestimate(network, broken())
    assert all(not layer.training and layer.momentum == 0.1 for layer in batchnorm.layers(network))
