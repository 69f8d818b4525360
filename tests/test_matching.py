"""Checkpoints from elsewhere: one matcher for all endings finds the network's weights, and says where they were."""

import argparse
import fractions
from collections import OrderedDict, defaultdict, deque
from copy import deepcopy
from datetime import datetime
from pathlib import Path, PurePath

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dfkd_ray import bundles, models
from dfkd_ray.bundles import weights
from helpers import refusal, tiny_network

ENDINGS = (".pt", ".pth.tar", ".PT", ".ckpt", ".bin", ".safetensors", ".SAFETENSORS")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "a.lightning.module.")
IMPORTED = ["--architecture", "resnet8", "--arguments", '{"width_multiplier": 0.5}', "--num-classes", "10"]
IMPORTED += ["--image-shape", "1x16x16", "--mean", "0.5", "--std", "0.25"]


def written(path, content):
    if path.suffix.lower() == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def other_values(state, add=1):
    return {name: tensor + add for name, tensor in state.items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


class Named(nn.Module):
    """A network of a user's, below names of a user's."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def small():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 3, 3), bn=nn.BatchNorm2d(3), fc=nn.Linear(3, 2))).eval()


def with_counts():
    network = small()
    network.bn.num_batches_tracked.fill_(7)  # type: ignore[operator, union-attr]
    nn.init.normal_(network.bn.running_mean)  # type: ignore[arg-type]
    return network


def found_in(tmp_path, network, content, key=None, ending=".pt"):
    """The match of a copy of the network; its state has been loaded into the copy."""
    path = written(tmp_path / f"w{ending}", content)
    into = deepcopy(network)
    for tensor in into.state_dict().values():
        tensor.zero_()
    found = bundles.match(into, bundles.read_state_dicts(path), path.name, key)
    bundles.load_state(into, found.state, path.name)
    return found, into.state_dict()


def equal(state, other):
    return list(state) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_a_prefix_is_taken_off_at_every_ending_and_said(tmp_path, ending, prefix):
    network = with_counts()
    state = network.state_dict()
    found, loaded = found_in(tmp_path, network, prefixed(state, prefix), ending=ending)
    assert equal(loaded, state) and not found.others
    assert found.notes == ((f"of the file's 9 tensors, 9 are taken: without the prefix {prefix!r}",) if prefix else ())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["module", "model", "_orig_mod", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_network_whose_own_submodule_has_a_wrappers_name_is_read(tmp_path, ending, name, prefix):
    network = Named(name, with_counts())
    _, loaded = found_in(tmp_path, network, prefixed(network.state_dict(), prefix), ending=ending)
    assert equal(loaded, network.state_dict())


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("own", ["net", "module", "wrapped"])
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_a_prefix_of_the_networks_own_is_put_on(tmp_path, ending, own, prefix):
    network = with_counts()
    found, loaded = found_in(tmp_path, Named(own, network), prefixed(network.state_dict(), prefix), ending=ending)
    assert equal(loaded, prefixed(network.state_dict(), f"{own}."))
    assert (f"with the network's prefix '{own}.'" in str(found.notes)) is not (prefix.endswith(f"{own}."))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"model_state_dict": state, "epoch": 3, "loss": 0.5},
        lambda state: {"net": state, "acc": 93.0},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "path": Path("x"), "pure": PurePath("y")},
        lambda state: {"state_dict": {"model": {"weights": state}}},
        lambda state: {"checkpoint": {"state_dict": prefixed(state, "module.")}},
        lambda state: {"ema": state},
        lambda state: {"best_acc": np.float64(0.5), "history": np.zeros(3), "dtype": np.dtype("int8"), "net": state},
        lambda state: {"log": defaultdict(list, loss=[0.5]), "last": deque([1, 2]), "at": datetime.now(), "net": state},
        lambda state: defaultdict(dict, net=state),
        lambda state: {**state, "epoch": 3, "name": "run", "best": np.float32(1)},
        lambda state: {"model": state, "state_dict": {name: tensor.clone() for name, tensor in state.items()}},
        lambda state: (state, {"lr": 0.1}),
        lambda state: [3, [state]],
        lambda state: OrderedDict(state),
        lambda state: {
            "state_dict": {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in state.items()}
        },
        lambda state: {
            "pytorch-lightning_version": "2.1",
            "state_dict": prefixed(state, "net."),
            "loops": {},
            "callbacks": {},
        },
    ],
    ids=range(17),
)
@pytest.mark.parametrize("legacy", [False, True])
def test_of_nested_mappings_the_one_that_fits_is_taken(tmp_path, wrap, legacy):
    network = with_counts()
    torch.save(wrap(network.state_dict()), tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    states = bundles.read_state_dicts(tmp_path / "w.ckpt")
    assert equal(bundles.match(network, states, "w.ckpt").state, network.state_dict())


def test_optimiser_state_and_what_else_lies_beside_the_weights_is_counted(tmp_path):
    network = with_counts().train()
    optimiser = torch.optim.Adam(network.parameters())
    sum(p.sum() for p in network.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    state = {**prefixed(network.state_dict(), "model."), "criterion.weight": torch.ones(2)}
    found, loaded = found_in(tmp_path, network, {"state_dict": state, "optimizer_states": [optimiser.state_dict()]})
    assert equal(loaded, network.state_dict())
    assert found.notes == (
        "of the file's 28 tensors, 9 are taken: those at state_dict, without the prefix 'model.', 19 left out",
    )


def test_an_averaged_model_alone_is_taken(tmp_path):
    network = with_counts()
    found, loaded = found_in(tmp_path, network, AveragedModel(network).state_dict())
    assert equal(loaded, network.state_dict())
    assert "without the prefix 'module.', 1 left out" in found.notes[0]


@pytest.mark.parametrize(
    "name", ["ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema", "swa_model", "avg"]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_weights_are_taken_before_averages_which_are_named_and_can_be_chosen(tmp_path, name, prefix):
    network = with_counts()
    state = network.state_dict()
    averaged = other_values(state)
    content = {name: prefixed(averaged, prefix), "model": state}
    place = f"{name}.{prefix}".removesuffix(".")
    found, loaded = found_in(tmp_path, network, content)
    assert equal(loaded, state) and found.others == (place,)
    for chosen in (name, place):
        found, loaded = found_in(tmp_path, network, content, key=chosen)
        assert equal(loaded, averaged) and found.others == ()
    assert equal(found_in(tmp_path, network, content, key="model")[1], state)


def test_averages_in_the_same_state_dict_are_told_from_the_plain_weights(tmp_path):
    network = with_counts()
    state, averaged = network.state_dict(), AveragedModel(network).state_dict()
    averaged = {name: tensor + 1 for name, tensor in averaged.items()}
    content = {"state_dict": {**prefixed(state, "net."), **prefixed(averaged, "ema.")}}
    found, loaded = found_in(tmp_path, network, content, ending=".ckpt")
    assert equal(loaded, state) and found.others == ("state_dict.ema.module",)
    found, loaded = found_in(tmp_path, network, {"a": averaged, "b": state})
    assert equal(loaded, state) and found.others == ("a.module",)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_the_names_as_they_are_come_before_averages_beside_them(tmp_path, ending):
    network = with_counts()
    state = network.state_dict()
    both = {**state, **prefixed(other_values(state), "ema.module.")}
    found, loaded = found_in(tmp_path, network, both, ending=ending)
    assert equal(loaded, state) and found.others == ("ema.module",)
    assert equal(found_in(tmp_path, network, both, "ema", ending)[1], other_values(state))
    student = {**state, **prefixed(other_values(state), "student.")}
    refusal(lambda: found_in(tmp_path, network, student, ending=ending), "several sets", "student")
    foreign = {**both, "aux.weight": torch.ones(2)}  # then it is the state dict of another network
    assert equal(found_in(tmp_path, network, foreign, ending=ending)[1], other_values(state))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_two_sets_that_fit_are_never_guessed_between(tmp_path, ending):
    network = with_counts()
    state = network.state_dict()
    both = {**prefixed(state, "student."), **prefixed(other_values(state), "teacher.")}
    refusal(lambda: found_in(tmp_path, network, both, ending=ending), "student, teacher", "`weights_key=student`")
    assert equal(found_in(tmp_path, network, both, "teacher", ending)[1], other_values(state))
    assert equal(found_in(tmp_path, network, both, "teacher.", ending)[1], other_values(state))
    refusal(lambda: found_in(tmp_path, network, both, "nets", ending), "at nets")
    refusal(lambda: found_in(tmp_path, network, both, "", ending), "at ''")


def test_plain_weights_below_wrappers_are_taken_before_averages_with_plain_names(tmp_path):
    network = with_counts()
    state = network.state_dict()
    wrapped = {name.replace(".", ".module.", 1): tensor for name, tensor in state.items()}
    found, loaded = found_in(tmp_path, network, {"net": wrapped, "ema": other_values(state)})
    assert equal(loaded, state) and found.others == ("ema",)
    refusal(lambda: found_in(tmp_path, network, {"a": wrapped, "b": other_values(state)}), "several sets")


def test_two_averages_are_never_guessed_between(tmp_path):
    state = small().state_dict()
    content = {"ema": other_values(state), "swa": state}
    refusal(lambda: found_in(tmp_path, small(), content), "ema, swa", "`weights_key=ema`")


def test_of_two_sets_with_the_same_names_the_one_with_the_networks_shapes_is_taken(tmp_path):
    network = with_counts()
    wide = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 8, 3), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 2)))
    content = {"teacher": wide.state_dict(), "student": network.state_dict()}
    assert equal(found_in(tmp_path, network, content)[1], network.state_dict())


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_missing_counters_of_batches_are_zero_and_said(tmp_path, ending, prefix):
    network = with_counts()
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    found, loaded = found_in(tmp_path, network, prefixed(state, prefix), ending=ending)
    assert loaded["bn.num_batches_tracked"] == 0 and equal({**loaded, **state}, loaded)
    assert "1 num_batches_tracked are not in the file: set to 0" in found.notes


def test_frozen_batchnorm_takes_the_weights_of_batchnorm(tmp_path):
    network = with_counts()
    frozen = deepcopy(network)
    frozen.bn = torchvision.ops.FrozenBatchNorm2d(3)
    found, loaded = found_in(tmp_path, frozen, network.state_dict())
    assert equal(loaded, {name: network.state_dict()[name] for name in loaded}) and "1 left out" in found.notes[0]


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.stem = nn.Sequential(self.conv, self.bn)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_network_with_two_names_for_a_tensor_is_read_as_save_model_wrote_it(tmp_path, prefix):
    network = Aliased()
    safetensors.torch.save_model(network, str(tmp_path / "m.safetensors"))
    stored = bundles.read_state_dicts(tmp_path / "m.safetensors")[""]
    assert len(stored) < len(network.state_dict())
    found, loaded = found_in(tmp_path, network, prefixed(stored, prefix), ending=".safetensors")
    assert equal(loaded, network.state_dict()) and "under another of their names" in found.notes[-1]


def test_two_names_of_one_tensor_with_different_values_are_refused(tmp_path):
    state = other_values(Aliased().state_dict(), 0)
    state["second.weight"] += 1
    refusal(lambda: found_in(tmp_path, Aliased(), state), "w.pt", "first.weight and second.weight differ")


@pytest.mark.parametrize("outer", ["", "module."])
def test_wrappers_within_names_are_taken_out(tmp_path, outer):
    """`features = DataParallel(features)`, as in PyTorch's ImageNet example, and compiled submodules."""
    network = Named("features", with_counts())
    network.head = nn.Linear(2, 2)
    for inner in ("module.", "_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."):
        state = network.state_dict()
        content = {outer + name.replace("features.", f"features.{inner}"): tensor for name, tensor in state.items()}
        found, loaded = found_in(tmp_path, Named("top", network), {"net": content} if not outer else content)
        assert equal(loaded, prefixed(state, "top."))
        assert "9 under other names" in found.notes[0] and "as top.features.conv.weight)" in found.notes[0]


def old_densenet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and keys as in torchvision's densenet121-a639ec97.pth (2017)."""
    parts: dict[str, str] = {"norm1": "norm.1", "norm2": "norm.2", "conv1": "conv.1", "conv2": "conv.2"}
    return {
        ".".join(parts.get(part, part) if "denselayer" in name else part for part in name.split(".")): tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


def test_densenets_old_names_are_taken_as_torchvision_takes_them(tmp_path):
    arguments = {"stem": "cifar", "width_multiplier": 0.125}
    network = models.build("densenet121", arguments, num_classes=10, image_shape=(1, 32, 32))
    old = old_densenet(network.state_dict())
    assert "features.denseblock1.denselayer2.norm.1.running_mean" in old
    for content in (old, prefixed(old, "module."), {"state_dict": old}):
        found, loaded = found_in(tmp_path, network, content)
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())
        assert "under other names" in found.notes[0] and "num_batches_tracked" in found.notes[1]


@pytest.mark.parametrize("architecture", [*sorted(models.torchvision_families.FAMILIES), "resnet20", "wrn_10_1"])
def test_a_familys_oldest_files_are_read(tmp_path, architecture):
    """Without counters and metadata, data-parallel, below a key, in PyTorch's older format."""
    vision = architecture in models.torchvision_families.FAMILIES
    arguments = {"stem": "cifar", "width_multiplier": 0.125} if vision else {}
    network = models.build(architecture, arguments, num_classes=10, image_shape=(1, 32, 32))
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("tracked")}
    content = {"state_dict": prefixed(state, "module."), "best_prec1": 90.0}
    torch.save(content, tmp_path / "w.tar", _use_new_zipfile_serialization=False)
    found = bundles.match(network, bundles.read_state_dicts(tmp_path / "w.tar"), "w.tar")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda state: {}, ["conv.weight", "no named tensors"]),
        (
            lambda state: {"head.weight" if n == "fc.weight" else n: t for n, t in state.items()},
            ["fc.weight", "head.weight"],
        ),
        (lambda state: {n: t for n, t in state.items() if n != "bn.running_var"}, ["1 of 9", "bn.running_var"]),
        (lambda state: {**state, "extra.weight": torch.ones(1)}, ["1 are not of it", "extra.weight"]),
        (lambda state: {**prefixed(state, "module."), "module.extra": torch.ones(1)}, ["module.extra", "at module"]),
        (lambda state: {**state, "fc.weight": torch.ones(5, 3)}, ["fc.weight is 5x3, expected 2x3"]),
        (lambda state: {"x.conv1.kernel": torch.ones(1), "b": torch.ones(1)}, ["x.conv1.kernel", "conv.weight"]),
        (
            lambda state: {"state_dict": {"bn.weigth": torch.ones(3)}, "o": {"k": torch.ones(1)}},
            ["bn.weight", "state_dict"],
        ),
        (lambda state: {"bn.weight": 3, "x": torch.ones(1)}, ["x", "none of the network's"]),
        (lambda state: prefixed(other_values(state), "x" * 500 + "."), []),
    ],
    ids=range(10),
)
def test_where_nothing_fits_the_names_found_and_the_nearest_expected_are_shown(tmp_path, change, parts):
    network = small()
    state = change(network.state_dict())
    if not parts:
        assert equal(found_in(tmp_path, network, state)[1], other_values(network.state_dict()))
        return
    text = refusal(lambda: found_in(tmp_path, network, state), "w.pt")
    assert all(part in text for part in parts) or "no named tensors" in text, text


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("name", "value"),
    [("fc.weight", np.nan), ("bn.weight", np.inf), ("bn.running_var", -1.0), ("bn.running_var", np.nan)],
)
def test_values_that_no_network_has_are_refused_by_name_at_every_ending(tmp_path, ending, prefix, name, value):
    state = other_values(small().state_dict(), 0)
    state[name].view(-1)[1] = value
    refusal(lambda: found_in(tmp_path, small(), prefixed(state, prefix), ending=ending), f"w{ending}", name)


class Config:
    pass


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (Config(), "test_matching.Config"),
        (nn.Linear(2, 2), "Linear"),
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (np.random.default_rng(0), "numpy.random"),
        (len, "len"),  # (Ray puts its own `print` in place: a process that has loaded it cannot pickle that one)
        ({1: {Config()}}, "test_matching.Config"),
    ],
    ids=range(6),
)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_a_type_that_is_not_read_is_named(tmp_path, beside, named, legacy):
    torch.save({"net": small().state_dict(), "x": beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    refusal(lambda: bundles.read_state_dicts(tmp_path / "w.pt"), "w.pt", named)


def test_another_pickle_protocol_is_named_and_not_a_network_that_is_too_large(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pt", pickle_protocol=4)
    text = refusal(lambda: bundles.read_state_dicts(tmp_path / "w.pt"), "w.pt", "operand")
    assert "http" not in text


def test_names_made_to_take_time_are_compared_in_little(tmp_path):
    deep = {"." * 5000 + str(index): torch.zeros(()) for index in range(200)}
    wide = {f"a{index}.conv.weight": torch.zeros(()) for index in range(2000)}
    long = {"x" * 20_000 + str(index): torch.zeros(()) for index in range(200)}
    many = {f"a{index}.{name}": t + index for index in range(100) for name, t in small().state_dict().items()}
    for state in (deep, wide, long, many):
        refusal(lambda state=state: bundles.match(small(), {"": state}, "w.pt"), "w.pt")


def test_one_object_under_many_keys_is_looked_at_once():
    state = small().state_dict()
    layers = {"w": state}
    for _ in range(7):
        layers = {str(index): layers for index in range(50)}
    assert len(weights.state_dicts(layers, "w.pt")) == 1


def test_two_parts_of_one_name_are_refused(tmp_path):
    state = small().state_dict()
    torch.save({"a": {"b": state}, "a.b": other_values(state)}, tmp_path / "w.pt")
    refusal(lambda: bundles.read_state_dicts(tmp_path / "w.pt"), "w.pt", "a.b")


def test_import_says_what_it_took_and_how_to_take_the_other(tmp_path, run_cli):
    network = tiny_network()
    state = network.state_dict()
    torch.save({"net": prefixed(state, "module."), "ema": other_values(state)}, tmp_path / "w.pth.tar")
    words = ["teacher", "import", str(tmp_path / "w.pth.tar"), *IMPORTED, "--out"]
    done = run_cli(*words, str(tmp_path / "plain"))
    assert (
        done.code == 0 and "note: the averaged weights at ema fit too" in done.out and "--weights-key ema" in done.out
    )
    assert "those at net, without the prefix 'module.', 62 left out" in done.out or "left out" in done.out
    assert run_cli(*words, str(tmp_path / "averaged"), "--weights-key", "ema").code == 0
    for name, expected in (("plain", state), ("averaged", other_values(state))):
        loaded = bundles.load(str(tmp_path / name)).network.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_import_writes_the_option_where_two_sets_fit(tmp_path, run_cli):
    state = tiny_network().state_dict()
    torch.save({"a": state, "b": other_values(state)}, tmp_path / "w.pt")
    done = run_cli("teacher", "import", str(tmp_path / "w.pt"), *IMPORTED, "--out", str(tmp_path / "out"))
    assert done.code == 2 and "--weights-key a" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
