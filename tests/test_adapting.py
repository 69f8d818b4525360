"""Networks from elsewhere are adapted: outputs, computed weights, layouts, copies; what cannot be is one line."""

import copy
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import dfkd_ray
from dfkd_ray import batchnorm, bundles, devices, models
from dfkd_ray.bundles.doubts import doubts
from dfkd_ray.compression import pruning
from dfkd_ray.models import adapting
from helpers import CPU, TINY_SETS, refusal

SHAPE, CLASSES = (1, 8, 8), 3
DESCRIBED = {"image_shape": SHAPE, "num_classes": CLASSES, "mean": 0.5, "std": 0.25}
IMAGES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A small network with BatchNorm; subclasses change what it gives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.fc, self.aux = nn.Linear(64, CLASSES), nn.Linear(64, CLASSES)

    def features(self, x):
        return F.max_pool2d(self.relu(self.bn(self.conv(x))), 2).flatten(1)

    def logits(self, x):
        return self.fc(self.features(x))

    def forward(self, x):
        return self.logits(x)


def adapted(network):
    return models.finish(network.eval(), "in memory", CLASSES, SHAPE)


# ---- outputs ---------------------------------------------------------------------------------------------------------

Named = namedtuple("Named", ["logits", "aux_logits"])


@dataclass
class Output:
    loss: None
    logits: torch.Tensor


def net_that_gives(answer, train_answer=None):
    class Gives(Net):
        def forward(self, x):
            y, aux = self.logits(x), self.aux(self.features(x))
            return (train_answer or answer)(y, aux) if self.training else answer(y, aux)

    return Gives()


def plain(y, _aux):
    return y


@pytest.mark.parametrize(
    ("answer", "train_answer"),
    [
        (plain, lambda y, aux: (y, aux)),
        (plain, Named),
        (plain, lambda y, aux: {"out": y, "aux": aux}),
        (Named, None),
        (lambda y, aux: {"features": aux[:, :2], "logits": y}, None),
        (lambda y, _: Output(None, y), None),
        (lambda y, aux: [aux[:, :1], y], None),
        (lambda y, _: y[:, :, None, None], None),
    ],
)
def test_logits_are_taken_out_of_any_output_in_train_and_eval_mode(answer, train_answer):
    expected = Net().eval()(IMAGES)
    network = adapted(net_that_gives(answer, train_answer))
    torch.testing.assert_close(network(IMAGES), expected)
    assert copy.deepcopy(network).train()(IMAGES).shape == (4, CLASSES)
    assert any("logits are taken" in note for note in adapting.notes(network))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda y, aux: (y, aux), "tuple (part 1, though part 2 has the same shape)"),
        (lambda y, aux: (aux[:, :2], y), "tuple (part 2)"),
        (lambda y, aux: {"age": y, "sex": aux[:, :2]}, "dict (age)"),
        (lambda y, aux: {"a": y, "b": aux}, "dict (a, though b has the same shape)"),
        (Named, "Named (logits)"),
    ],
)
def test_the_part_that_is_taken_and_another_of_its_shape_are_named(answer, says):
    assert f"its logits are taken out of {says};" in adapting.notes(adapted(net_that_gives(answer)))[0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda y, _: (y[:, :2],), "gives tuple"),
        (lambda y, _: y.squeeze(), "drops the axis of a single image"),
        (lambda y, _: y.mean(), "its forward must return the logits"),
        (lambda y, _: y[:, :2], "check the class count"),
        (lambda y, _: y.argmax(1), "gives torch.int64"),
        (lambda y, _: {"scores": [y]}, "gives dict"),
        (lambda y, _: y[:1], "for 2 images"),
    ],
)
def test_an_output_without_logits_is_refused_with_what_was_returned(answer, says):
    refusal(lambda: adapted(net_that_gives(answer)), says)


def test_an_output_that_is_wrong_in_train_mode_alone_is_refused_at_once():
    refusal(lambda: adapted(net_that_gives(plain, lambda y, _: [y.sum()])), "in train mode gives list")


@pytest.mark.parametrize("answer", [lambda y, _: y[:, :1], lambda y, _: y[:, 0]])
def test_one_logit_for_two_classes_is_told_how_to_be_two(answer):
    network = net_that_gives(answer).eval()
    refusal(lambda: models.finish(network, "in memory", 2, SHAPE), "torch.stack([0 * x, x], 1).flatten(1)")
    x = answer(Net().eval()(IMAGES), None)
    two = torch.stack([0 * x, x], 1).flatten(1)
    torch.testing.assert_close(two.softmax(1)[:, 1], x.flatten().sigmoid())


# ---- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [lambda y, _: y.softmax(1), lambda y, _: torch.softmax(y.double(), dim=-1).float()])
def test_a_network_that_ends_in_softmax_gives_its_logits_up_to_a_constant(last):
    expected = Net().eval()(IMAGES).softmax(1)
    network = adapted(net_that_gives(last))
    logits = network(IMAGES)
    torch.testing.assert_close(logits.softmax(1), expected)
    assert (logits < 0).any() and any("softmax" in note for note in adapting.notes(network))


@pytest.mark.parametrize("last", [lambda y, _: y.sigmoid(), lambda y, _: nn.Sigmoid()(y).view(-1, CLASSES)])
def test_a_network_that_ends_in_sigmoid_gives_its_logits_and_needs_that_head(last):
    expected = Net().eval()(IMAGES)
    torch.testing.assert_close(adapted(net_that_gives(last))(IMAGES), expected, rtol=1e-3, atol=1e-4)
    refusal(lambda: bundles.Teacher.from_network(net_that_gives(last), **DESCRIBED), "ends in a sigmoid", "sigmoid")
    assert bundles.Teacher.from_network(net_that_gives(last), **DESCRIBED, head="sigmoid").info.head == "sigmoid"


@pytest.mark.parametrize("last", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_last_function_of_one_mode_is_undone_in_that_mode_alone(last, mode):
    functions = {"softmax": lambda y, _: y.softmax(1), "sigmoid": lambda y, _: y.sigmoid()}
    in_train = mode == "train"
    network = adapted(net_that_gives(*(plain, functions[last]) if in_train else (functions[last], plain)))
    for training in (False, True):
        logits, expected = network.train(training)(IMAGES), Net().train(training)(IMAGES)
        if last == "softmax" and training == in_train:
            logits, expected = logits.softmax(1), expected.softmax(1)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert f"it ends in a {last} in {mode} mode" in str(adapting.notes(network))


def test_a_softmax_does_not_go_with_independent_labels():
    network = net_that_gives(lambda y, _: y.softmax(1))
    refusal(lambda: bundles.Teacher.from_network(network, **DESCRIBED, head="sigmoid"), "ends in a softmax")


def test_small_logits_are_no_probabilities():
    network = Net()
    with torch.no_grad():
        network.fc.weight.mul_(1e-3)
        network.fc.bias.copy_(torch.tensor([0.2, 0.5, 0.4]))
    assert adapting.notes(adapted(network)) == ()


# ---- computed weights ------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


COMPUTED = {
    "weight_norm": lambda net: [nn.utils.parametrizations.weight_norm(net.conv), net][1],
    "old_weight_norm": lambda net: [nn.utils.weight_norm(net.conv), net][1],
    "spectral_norm": lambda net: [nn.utils.parametrizations.spectral_norm(net.fc), net][1],
    "old_spectral_norm": lambda net: [nn.utils.spectral_norm(net.fc), net][1],
    "own": lambda net: [nn.utils.parametrize.register_parametrization(net.fc, "weight", Doubled()), net][1],
    "bias": lambda net: [nn.utils.parametrize.register_parametrization(net.fc, "bias", Doubled()), net][1],
    "pruned": lambda net: [prune.l1_unstructured(net.conv, "weight", 0.5), net][1],
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_become_plain_ones_and_can_be_pruned(kind):
    network = COMPUTED[kind](Net()).eval()
    expected = network(IMAGES)
    teacher = bundles.Teacher.from_network(network, **DESCRIBED)
    torch.testing.assert_close(teacher.network(IMAGES), expected)
    assert any("computed weights" in note for note in adapting.notes(teacher.network))
    student = copy.deepcopy(teacher.network)
    config = pruning.PruningConfig(sparsity=0.9, spare_first=False, spare_last=False)
    pruning.apply(student, pruning.masks(student, config))
    assert pruning.achieved_sparsity(student) == pytest.approx(0.9, abs=0.01)
    student(IMAGES)
    assert pruning.achieved_sparsity(student) == pytest.approx(0.9, abs=0.01)
    student.load_state_dict(dict(student.state_dict()))  # as from a file: without PyTorch's versions


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_computed_weights_of_the_users_own_network_stay_computed(kind):
    network = COMPUTED[kind](Net()).eval()
    expected = network(IMAGES)
    first, second = (bundles.Teacher.from_network(network, **DESCRIBED) for _ in range(2))
    assert first.hash == second.hash and torch.equal(network(IMAGES), expected)


class Goes(Net):
    """A network that goes by an attribute."""

    def __init__(self, how):
        super().__init__()
        self.how, self._calls = how, 0

    def forward(self, x):
        self._calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    "values",
    [
        *[(1.0, 2.0), ("mean", "max"), ((1, 2), (2, 1)), ({"a": 1}, {"a": 2}), (None, False), ({1, 2}, {1, 3})],
        *[(torch.ones(2), torch.zeros(2)), (torch.tensor(1.0), torch.tensor(2.0)), (F.relu, F.relu6)],
        *[(lambda x: x + 1, lambda x: x + 2), (nn.ReLU.forward, nn.Tanh.forward)],
    ],
)
def test_networks_in_memory_that_go_by_other_attributes_have_other_hashes(values):
    def hash_of(value):
        torch.manual_seed(0)
        network = Goes(value)
        network(IMAGES)
        return bundles.Teacher.from_network(network, **DESCRIBED).hash

    assert hash_of(values[0]) == hash_of(values[0]) != hash_of(values[1])
    assert hash_of(object()) == hash_of(object()), "an object says nothing of its content"


# ---- layouts ---------------------------------------------------------------------------------------------------------


class Views(Net):
    def features(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return F.max_pool2d(x, 2).view(x.size(0), -1)


def test_a_network_that_fails_on_channels_last_runs_contiguous_everywhere():
    network = adapted(Views())
    assert devices.layout(network) is torch.contiguous_format
    placed = devices.place(copy.deepcopy(network), CPU)
    placed(devices.laid_out(IMAGES, placed))
    assert devices.layout(adapted(Net())) is torch.channels_last


class Strided(Net):
    """RepVGG's stem: it kills the process in channels last (PyTorch 2.14 on a CPU)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)
        self.stem, self.bn = nn.Conv2d(3, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4)

    def features(self, x):
        return self.relu(self.bn(self.stem(self.conv(x)))).flatten(1)


def test_a_strided_pointwise_convolution_of_few_channels_runs_contiguous():
    assert devices.layout(adapted(Strided())) is torch.contiguous_format
    done = dfkd_ray.recover(Strided(), sparsity=0.5, settings=TINY_SETS, progress=False, **DESCRIBED)
    assert done.row["status"] == "finished"


class Volumes(nn.Module):
    """Convolves the channels of its images as slices of a volume."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x.unsqueeze(1)))).mean((2, 3, 4)))


def test_a_network_of_volumes_runs_contiguous_and_is_recovered():
    network = Volumes().eval()
    expected = network(IMAGES)
    torch.testing.assert_close(bundles.Teacher.from_network(network, **DESCRIBED).network(IMAGES), expected)
    # In bfloat16 PyTorch 2.14 gives garbage for thin volumes on CPUs with AMX.
    plain = dict.fromkeys(("synthesis.precision", "reference.synthesis.precision", "distillation.precision"), "float32")
    done = dfkd_ray.recover(network, sparsity=0.5, settings=TINY_SETS | plain, progress=False, **DESCRIBED)
    assert done.row["status"] == "finished"


# ---- copies and gradients --------------------------------------------------------------------------------------------


def closure():
    network = Net()
    own = network.forward
    network.forward = lambda x: own(x)
    return network


def bound_part():
    network = Net()
    network.features = lambda x: Net.features(network, x)
    return network


@pytest.mark.parametrize("make", [closure, bound_part])
def test_a_forward_that_stays_with_the_original_is_refused(make):
    refusal(lambda: adapted(make()), "a copy of it still computes with the original's weights")


def test_a_forward_without_gradients_is_refused():
    refusal(lambda: adapted(net_that_gives(lambda y, _: y.detach())), "no gradient")


def test_a_forward_without_gradients_in_train_mode_alone_is_refused():
    refusal(lambda: adapted(net_that_gives(plain, lambda y, _: y.detach())), "no gradient with respect to its weights")


class Overwrites(Net):
    def features(self, x):
        return self.bn(self.conv(x)).relu().mul_(2).relu()[:, :, :4, :4].flatten(1)


def test_a_forward_that_overwrites_what_its_gradient_needs_is_refused():
    refusal(lambda: adapted(Overwrites()), "cannot be trained")


def test_dropout_that_is_always_on_is_refused():
    refusal(lambda: adapted(net_that_gives(lambda y, _: F.dropout(y, 0.5))), "pass to pass")


class InPlace(Net):
    def forward(self, x):
        x -= 0.5
        return self.logits(x.mul_(2))


def test_a_network_that_changes_its_images_gets_copies():
    expected = Net().eval()((IMAGES - 0.5) * 2)
    network, images = adapted(InPlace()), IMAGES.clone().requires_grad_(True)
    for _ in range(2):
        torch.testing.assert_close(network(images), expected)
    assert torch.equal(images, IMAGES) and "a copy" in adapting.notes(network)[0]


def test_what_is_run_to_find_out_changes_neither_weights_nor_the_global_generator():
    network = net_that_gives(plain, lambda y, aux: (F.dropout(y), aux)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    adapted(network)
    assert torch.equal(torch.rand(3), expected) and not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


# ---- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precisions_become_float32(kind):
    teacher = bundles.Teacher.from_network(Net().to(kind), **DESCRIBED)
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32}


def test_wrapped_networks_are_unwrapped():
    network = Net()
    names = list(network.state_dict())
    wrapped = nn.DataParallel(network)
    assert list(bundles.Teacher.from_network(wrapped, **DESCRIBED).network.state_dict()) == names


class HalfBright(nn.Module):
    def __init__(self):
        super().__init__()
        self._orig_mod = Net()

    def forward(self, x):
        return self._orig_mod(0.5 * x)


def test_what_surrounds_a_part_with_a_wrappers_name_is_kept():
    teacher = bundles.Teacher.from_network(HalfBright(), **DESCRIBED)
    torch.testing.assert_close(teacher.network(IMAGES), Net().eval()(0.5 * IMAGES))


def test_a_compiled_network_is_unwrapped():
    compiled: Any = torch.compile(Net())
    assert list(bundles.Teacher.from_network(compiled, **DESCRIBED).network.state_dict()) == list(Net().state_dict())


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))


def test_lazy_layers_of_a_factory_get_their_weights_and_in_memory_are_refused():
    assert len(batchnorm.layers(adapted(lazy()))) == 1
    refusal(lambda: bundles.Teacher.from_network(lazy(), **DESCRIBED), "lazy")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda network: torch.jit.trace(network, IMAGES)])
def test_torchscript_is_refused_with_what_to_hand_in(make):
    refusal(lambda: bundles.Teacher.from_network(make(Net().eval()), **DESCRIBED), "TorchScript", "nn.Module")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda net: net.fc.weight.data.fill_(torch.nan), "fc.weight has values that are not finite"),
        (lambda net: net.fc.weight.data.fill_(torch.inf), "fc.weight has values that are not finite"),
        (lambda net: net.bn.running_var.fill_(torch.nan), "bn.running_var has values that are not finite"),
        (lambda net: net.bn.running_var.fill_(-1.0), "bn.running_var has negative values"),
        (lambda net: net.to("meta"), "on the meta device"),
        (lambda net: net.register_buffer("filter", torch.ones(2, dtype=torch.complex64)), "filter in torch.complex64"),
    ],
)
def test_values_that_no_bundle_holds_are_refused_in_memory_too(change, says):
    network = Net()
    change(network)
    refusal(lambda: bundles.Teacher.from_network(network, **DESCRIBED), says)


class Shared(Net):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(self.conv, self.bn)


@pytest.mark.parametrize("make", [Net, Shared, Views, lambda: COMPUTED["weight_norm"](Net())])
def test_recovery_of_networks_from_elsewhere_ends_as_asked(make, tmp_path):
    settings = {
        **TINY_SETS,
        "distillation.num_steps": 4,
        "distillation.checkpoint_every": 2,
        "distillation.eval_every": 1,
    }
    done = dfkd_ray.recover(make(), sparsity=0.9, settings=settings, progress=False, **DESCRIBED)
    assert done.row["status"] == "finished" and done.row["achieved_sparsity"] == pytest.approx(0.9, abs=0.01)
    assert done.student(IMAGES).shape == (4, CLASSES)


# ---- doubts ----------------------------------------------------------------------------------------------------------


def trained_like(scale=1.0, offset=0.0):
    """A network whose first statistics are those of images `scale` x + `offset` for normalised noise x."""
    network = Net()
    network.train()
    for step in range(60):
        images = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(step))
        network(scale * (images - 0.5) / 0.25 + offset)
    return network.eval()


@pytest.mark.parametrize(
    ("network", "changes", "says"),
    [
        (trained_like(), {}, None),
        (trained_like(255.0), {}, "no image of this mean"),
        (trained_like(offset=30.0), {}, "no image of this mean"),
        (trained_like(), {"pixel_range": (0.49, 0.51)}, "no image of this mean"),
        (Net(), {}, "initial"),
    ],
)
def test_statistics_that_no_image_gives_are_said(network, changes, says):
    teacher = bundles.Teacher.from_network(network, **{**DESCRIBED, **changes})
    found = doubts(teacher)
    assert (found == []) if says is None else any(says in doubt for doubt in found), found


class Standardised(nn.Conv2d):
    def forward(self, input):
        return 9 * super().forward(input)


class Inner(Net):
    """Normalises within."""

    def forward(self, x):
        return self.logits((x + 7) * 3)


def test_statistics_of_a_layer_that_sees_no_pixels_or_computes_otherwise_are_not_doubted():
    network = Net()
    network.conv = Standardised(1, 4, 3, padding=1)
    for one in (network, Inner()):
        one.train()
        for step in range(60):
            one((torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(step)) - 0.5) / 0.25)
        assert doubts(bundles.Teacher.from_network(one, **DESCRIBED)) == []


def test_outputs_between_0_and_1_are_doubted_as_logits():
    network = trained_like()
    capsules = net_that_gives(lambda y, _: y.square() / (1 + y.square()))
    capsules.load_state_dict(network.state_dict())
    teachers = [bundles.Teacher.from_network(one, **DESCRIBED) for one in (network, capsules)]
    assert ["between 0 and 1" in str(doubts(teacher)) for teacher in teachers] == [False, True]


def test_shares_of_another_whole_than_1_are_doubted_as_logits():
    percent = net_that_gives(lambda y, _: 100 * y.softmax(1))
    percent.load_state_dict(trained_like().state_dict())
    assert "the same sum for each image" in str(doubts(bundles.Teacher.from_network(percent, **DESCRIBED)))


def test_a_teacher_that_is_sure_of_noise_is_doubted():
    network = trained_like()
    with torch.no_grad():
        network.fc.weight.mul_(1e4)
    assert any("sure of noise" in doubt for doubt in doubts(bundles.Teacher.from_network(network, **DESCRIBED)))


@pytest.mark.parametrize("name", ["fashion_mnist_resnet8", "fashion_mnist_resnet20"])
def test_the_bundled_teachers_are_not_doubted(name):
    assert doubts(bundles.load(name)) == []
