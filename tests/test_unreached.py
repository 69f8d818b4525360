"""Weights of convolutions that no pixel reaches have no gradient, whatever the kernels of the machine leave there."""

import pytest
import torch
from torch import nn

from dfkd_ray import devices
from dfkd_ray.compression import unreached

CPU = torch.device("cpu")


def gradient(weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a weight, which has one."""
    assert weight.grad is not None
    return weight.grad


class Same(nn.Module):
    """One convolution used on maps of two sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, images):
        return self.conv(images).mean((2, 3)) + self.conv(images[..., :1, :1]).mean((2, 3))


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 1)),
        (nn.Conv2d(4, 6, 3, stride=3, padding=1), (2, 2)),
        (nn.Conv2d(4, 4, 5, stride=(4, 1), padding=2, groups=4), (3, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 1)),
        (nn.Conv1d(4, 6, 5, stride=2, padding=2), (1,)),
        (nn.Conv2d(4, 6, 3), (8, 8)),
    ],
    ids=str,
)
def test_the_taps_that_are_named_are_those_without_a_gradient(layer, size):
    torch.manual_seed(0)
    images = torch.rand(8, 4, *size) + 0.1
    with unreached.Reached() as seen:
        result = layer(images)
    (taps,) = seen.taps.values()
    result.sum().backward()  # every pixel is positive: a tap without a gradient is one that no pixel reaches
    assert torch.equal(taps, (gradient(layer.weight) != 0).flatten(0, 1).any(0))


def test_a_gradient_that_was_never_written_is_zero_and_the_others_stay():
    layer, images = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.rand(8, 4, 1, 1)
    weight = layer.weight
    unwritten = torch.full_like(weight, float("nan"))
    unwritten[:, :, 1, 1] = 2.0  # the centre alone is reached
    with unreached.zero_gradients(layer, images[:1]):
        (weight * unwritten).sum().backward()
        assert torch.equal(gradient(weight), unwritten.nan_to_num(0.0))
    (weight * unwritten).sum().backward()
    assert gradient(weight).isnan().any(), "outside nothing is changed"


def test_a_weight_that_is_reached_in_one_of_its_places_keeps_its_gradient():
    network = Same()
    images = torch.rand(2, 2, 4, 4)
    with unreached.zero_gradients(network, images[:1]):
        network(images).sum().backward()
    assert gradient(network.conv.weight).all()


def test_training_in_bfloat16_on_maps_of_one_pixel_gives_the_same_bytes_each_time():
    """The case that PyTorch's kernels leave unwritten on CPUs with AVX-512 or AMX; elsewhere it passes anyway."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(16, 16, 3, stride=2, padding=1), torch.randn(8, 16, 1, 1)
    found = []
    with unreached.zero_gradients(layer, images[:1]):
        for _ in range(6):
            junk = [
                torch.full((16 * 16 * 9,), float("nan"), dtype=kind) for kind in (torch.float32, torch.bfloat16) * 9
            ]
            del junk
            layer.zero_grad()
            with devices.autocast("bfloat16", CPU):
                result = layer(images)
            result.float().square().sum().backward()
            found.append(gradient(layer.weight).clone())
    assert all(torch.equal(each, found[0]) for each in found) and torch.isfinite(found[0]).all()
