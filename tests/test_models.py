import functools
import sys

import pytest
import torch
import torchvision
from torch import nn

from dfkd_ray import batchnorm, bundles, models
from dfkd_ray.models import torchvision_families, without_batchnorm

VISION = sorted(torchvision_families.FAMILIES)
CIFAR = ["resnet8", "resnet20", "resnet32", "resnet56"]


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def build(architecture, num_classes=10, image_shape=(3, 32, 32), **arguments):
    return models.build(architecture, arguments, num_classes=num_classes, image_shape=image_shape)


@functools.cache
def small(architecture):
    """A family with the stem for small images and an eighth of the width (kept: VGG is slow to build)."""
    return build(architecture, image_shape=(1, 32, 32), stem="cifar", width_multiplier=0.125)


def test_the_families_of_the_paper_are_there():
    paper = {"resnet18", "resnet34", "resnet50", "wide_resnet50_2", "mobilenet_v2", "vgg19_bn", "densenet121"}
    assert paper | {"shufflenet_v2_x1_0"} <= set(models.FAMILIES)
    assert set(models.FAMILIES) == set(VISION) | set(CIFAR) | set(without_batchnorm.FAMILIES)


@pytest.mark.parametrize("architecture", VISION)
def test_default_families_have_torchvisions_names_and_shapes(architecture):
    with torch.device("meta"):
        own = build(architecture, num_classes=1000, image_shape=(3, 224, 224)).state_dict()
        other = torchvision.models.get_model(architecture, weights=None).state_dict()
    assert list(own) == list(other)
    assert all(own[name].shape == tensor.shape and own[name].dtype == tensor.dtype for name, tensor in other.items())


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "mobilenet_v2", "shufflenet_v2_x1_0"])
def test_torchvisions_weights_give_torchvisions_outputs(architecture):
    other = torchvision.models.get_model(architecture, weights=None, num_classes=7).eval()
    own = build(architecture, num_classes=7, image_shape=(3, 64, 64))
    bundles.load_state(own, other.state_dict(), "torchvision")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(own(images), other(images))


@pytest.mark.parametrize("architecture", VISION)
def test_every_family_builds_small_with_batchnorm(architecture):
    network = small(architecture)
    assert len(batchnorm.layers(network)) >= 8
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("architecture", VISION)
def test_the_small_stem_keeps_the_resolution_and_ends_at_four_or_two_pixels(architecture):
    sizes = []
    network = small(architecture)
    hooks = [
        module.register_forward_hook(lambda module, _, output: sizes.append(tuple(output.shape[2:])))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    network(torch.zeros(1, 1, 32, 32))
    for hook in hooks:
        hook.remove()
    assert sizes[0] == (32, 32)
    assert sizes[-1] in ((4, 4), (2, 2))


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0", "resnet20"])
def test_a_wider_network_has_more_parameters(architecture):
    counts = []
    with torch.device("meta"):
        counts = [num_parameters(build(architecture, width_multiplier=width)) for width in (0.25, 0.5, 1.0)]
    assert counts[0] < 0.6 * counts[1] < 0.6 * counts[2]


def test_the_width_multiplier_of_vgg_scales_its_convolutions():
    with torch.device("meta"):
        half, whole = (
            build("vgg11_bn", stem="cifar", width_multiplier=width).get_submodule("features") for width in (0.5, 1.0)
        )
    halves, wholes = (
        [module.out_channels for module in features.children() if isinstance(module, nn.Conv2d)]
        for features in (half, whole)
    )
    assert wholes and [2 * width for width in halves] == wholes


@pytest.mark.parametrize(("architecture", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_cifar_resnets_have_the_papers_parameter_counts(architecture, millions):
    # He et al. 2015, table 6.
    assert round(num_parameters(build(architecture)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("architecture", "count"), [("wrn_16_1", 175_066), ("wrn_40_1", 563_930), ("wrn_16_2", 691_674)]
)
def test_wide_resnets_have_the_published_parameter_counts(architecture, count):
    assert num_parameters(build(architecture)) == count


@pytest.mark.parametrize("architecture", ["resnet20", "wrn_16_1"])
def test_small_networks_start_with_outputs_that_differ_between_images(architecture):
    torch.manual_seed(0)
    network = build(architecture).train()
    logits = network(torch.randn(16, 3, 32, 32))
    assert logits.isfinite().all() and logits.std(dim=0).mean() > 0.01


def test_an_option_a_shortcut_is_the_strided_input_between_zero_channels():
    block = models.cifar_resnet.Block(2, 6, stride=2)
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(1, 2, 4, 4)
    y = block.eval()(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 4:].any()


def test_the_same_seed_gives_the_same_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build("resnet8").state_dict()["conv1.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_an_unknown_architecture_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError) as caught:
        build("resnet19")
    assert all(
        name in str(caught.value) for name in (*models.FAMILIES, "wrn_<depth>_<width>", "package.module:factory")
    )


@pytest.mark.parametrize("name", ["wrn_17_1", "wrn_4_1", "wrn_16_0"])
def test_an_impossible_wide_resnet_is_refused(name):
    with pytest.raises(ValueError, match=r"expected a depth of 6n \+ 4"):
        build(name)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg11_bn", "wrn_16_1"])
def test_an_unknown_argument_is_refused_by_name(name):
    with pytest.raises(ValueError, match="widht"):
        build(name, widht=2)


def test_an_unknown_stem_is_refused():
    assert [torchvision_families.check_stem(stem) for stem in ("imagenet", "cifar")] == [False, True]
    with pytest.raises(ValueError, match=r"stem 'cifar10': expected 'imagenet' or 'cifar'"):
        torchvision_families.check_stem("cifar10")


@pytest.mark.parametrize("width", ["wide", None, -1.0, 0.0])
@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_a_width_that_is_no_positive_number_is_refused(name, width):
    with pytest.raises(ValueError, match="width_multiplier"):
        build(name, width_multiplier=width)


def test_images_too_small_for_the_network_are_refused_with_their_shape():
    with pytest.raises(ValueError, match="does not take images of 3x8x8"):
        build("densenet121", image_shape=(3, 8, 8), width_multiplier=0.125)


def test_a_wrong_class_count_is_refused():
    with pytest.raises(ValueError, match=r"gives \(1, 5\) for one image, expected \(1, 10\)"):
        models.check_output(build("resnet8", num_classes=5), "own:net", 10, (3, 32, 32))


@pytest.mark.parametrize("name", ["num_classes", "image_shape"])
def test_what_the_bundle_gives_is_refused_among_the_arguments(name):
    with pytest.raises(ValueError, match=f"{name} is given by the bundle"):
        models.build("resnet8", {name: 5}, num_classes=10, image_shape=(1, 16, 16))


def test_a_network_that_fails_in_its_own_way_is_refused_in_one_line():
    class Broken(nn.Module):
        def forward(self, x):
            raise AssertionError("needs\ntwo inputs")

    with pytest.raises(ValueError, match=r"does not take images of 3x8x8: needs$"):
        models.check_output(Broken(), "own:net", 10, (3, 8, 8))


OWN = """
from torch import nn
number = 3
def make(width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, width), nn.Linear(width, 10))
def text():
    return "net"
def several():
    class Several(nn.Module):
        def forward(self, x):
            return [x]
    return Several()
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_architectures.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_architectures", None)


@pytest.mark.usefixtures("own_module")
def test_a_users_factory_is_called_with_its_arguments_alone():
    network = build("own_architectures:make", image_shape=(1, 16, 16), width=6)
    assert network.get_submodule("1").out_features == 6 and not network.training


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("path", "arguments", "says"),
    [
        ("no_such_module_of_ours:make", {}, "cannot import 'no_such_module_of_ours'"),
        ("own_architectures:nothing", {}, "no callable 'nothing'"),
        ("own_architectures:number", {}, "no callable 'number'"),
        ("own_architectures:text", {}, "returned str, expected a torch.nn.Module"),
        ("own_architectures:several", {}, "gives list for one image"),
        ("own_architectures:make", {"depth": 2}, "unexpected keyword argument 'depth'"),
    ],
)
def test_a_users_factory_that_makes_no_network_is_refused(path, arguments, says):
    with pytest.raises(ValueError) as caught:
        build(path, image_shape=(1, 16, 16), **arguments)
    assert says in str(caught.value)
