"""Architectures from elsewhere: too large ones are found without memory, and code that fails is one line."""

import importlib
import os
import resource
import sys

import pytest
import torch

from dfkd_ray import bundles, models
from helpers import assert_one_error, refusal


def build(architecture, arguments=None, num_classes=10, image_shape=(1, 16, 16)):
    return models.build(architecture, arguments or {}, num_classes=num_classes, image_shape=image_shape)


@pytest.mark.parametrize(
    ("architecture", "arguments", "num_classes", "image_shape"),
    [
        ("wrn_99999999_1", {}, 10, (1, 16, 16)),
        ("wrn_60004_1", {}, 10, (1, 16, 16)),
        ("wrn_16_99999", {}, 10, (1, 16, 16)),
        ("wrn_" + "9" * 5000 + "_1", {}, 10, (1, 16, 16)),
        ("wrn_16_" + "9" * 5000, {}, 10, (1, 16, 16)),
        ("resnet56", {"width_multiplier": 999}, 10, (1, 16, 16)),
        ("resnet50", {"width_multiplier": 999.0}, 10, (1, 32, 32)),
        ("densenet121", {"width_multiplier": 999}, 10, (1, 64, 64)),
        ("vgg19_bn", {"width_multiplier": 900}, 10, (1, 32, 32)),
        ("mobilenet_v2", {"width_multiplier": 900}, 10, (1, 32, 32)),
        ("resnet20", {"width_multiplier": 10**400}, 10, (1, 16, 16)),
        ("resnet8", {}, 10**12, (1, 16, 16)),
        ("alexnet", {}, 1_000_000, (1, 64, 64)),
        ("hinton_1200", {}, 10, (3, 100_000, 100_000)),
        ("hinton_1200", {}, 10, (3, 4096, 4096)),
        ("resnet18", {}, 10, (1, 10**9, 10**9)),
        ("resnet18", {"stem": "cifar"}, 10, (1, 8000, 8000)),
        ("resnet8", {}, 10, (60_000_000, 1, 1)),
        ("x" * 100_000, {}, 10, (1, 16, 16)),
        ("resnet8", {"y" * 10_000: 1}, 10, (1, 16, 16)),
    ],
)
def test_an_architecture_too_large_is_refused_before_memory_is_taken(architecture, arguments, num_classes, image_shape):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(lambda: build(architecture, arguments, num_classes, image_shape), architecture[:8])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


def test_building_draws_the_same_weights_as_without_measuring():
    torch.manual_seed(3)
    measured = build("wrn_16_1").state_dict()
    torch.manual_seed(3)
    plain = models.family("wrn_16_1")(num_classes=10, image_shape=(1, 16, 16)).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in measured.items())


def test_bytes_of_a_network_are_known_without_building_it():
    state = build("resnet20").state_dict()
    expected = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert models.state_bytes("resnet20", {}, 10, (1, 16, 16)) == expected


OWN = """
import sys
import torch
from torch import nn

class Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.linear = nn.Linear(256, 10)
    def forward(self, x):
        return self.answer(self.linear(x.flatten(1)))

class Output(dict):
    pass

class Extra(Answers):
    def get_extra_state(self):
        return "more"
    def set_extra_state(self, state):
        pass

def leaves(*_):
    sys.exit(7)
def recurses(x=0):
    return recurses(x)
def raises(*_):
    raise Exception("first\\nsecond")
def interrupts_nothing():
    raise BaseException if False else RuntimeError("\\x1b[31mred" * 1000)
def no_network(): return 3
def a_class(): return nn.Module
def a_tuple(): return Answers(lambda y: (y, y))
def a_dict(): return Answers(lambda y: {"logits": y, "aux": y})
def a_dict_of_others(): return Answers(lambda y: {"aux": y[:, :5]})
def an_output(): return Answers(lambda y: Output(logits=y))
def nothing(): return Answers(lambda y: None)
def raising(): return Answers(raises)
def leaving(): return Answers(leaves)
def recursing(): return Answers(recurses)
def other_shape(): return Answers(lambda y: y.view(10))
def whole_numbers(): return Answers(lambda y: y.long())
def without_memory():
    with torch.device("meta"):
        return Answers(lambda y: y)
def too_large(): return nn.Linear(10**9, 10**9)
def more_state(): return Extra(lambda y: y)

def lazily():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10))

THE = Answers(lambda y: y)
def always_the_same():
    return THE

class Drawn(Answers):
    def __init__(self):
        super().__init__(lambda y: y * self.factor)
        self.register_buffer("factor", torch.rand(1), persistent=False)

class Tires(Answers):
    def __init__(self, error):
        super().__init__(lambda y: y)
        self.error, self.bn = error, nn.BatchNorm1d(256)
    def forward(self, x):
        if len(x) > 2:
            raise self.error
        return self.linear(self.bn(x.flatten(1)))

def tires(): return Tires(RuntimeError("no luck\\nthis time"))
def walks_off(): return Tires(SystemExit(0))

class Nets:
    class Small:
        @classmethod
        def from_name(cls, name="a"):
            return Answers(lambda y: y)
        @staticmethod
        def make():
            return Answers(lambda y: y)
    number = 3
    @property
    def late(self):
        raise ZeroDivisionError("late")
nets = Nets()
tables = {"a": 1}
"""
MODULES = {
    "syntax": "def make(:",
    "raises": "raise KeyError('no')",
    "leaves": "import sys; sys.exit(0)",
    "recurses": "def f(): f()\nf()",
    "asserts": "assert False",
    "generator": "raise GeneratorExit" if False else "raise StopIteration",
    "bytes": "\x00",
    "late": "def __getattr__(name): raise ZeroDivisionError(name)",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_factories.py").write_text(OWN)
    for name, text in MODULES.items():
        (tmp_path / f"own_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_fails_or_leaves_in_import_is_one_line(module):
    refusal(lambda: build(f"own_{module}:make"), f"own_{module}")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("leaves", "SystemExit: 7"),
        ("recurses", "RecursionError"),
        ("raises", "Exception: first"),
        ("interrupts_nothing", "RuntimeError"),
        ("no_network", "returned int"),
        ("a_class", "returned type"),
        ("a_dict_of_others", "gives dict for one image (aux: tensor of 1x5)"),
        ("nothing", "gives NoneType"),
        ("raising", "does not take images of 1x16x16: first"),
        ("leaving", "does not take images of 1x16x16: 7"),
        ("recursing", "does not take images of 1x16x16: maximum recursion depth"),
        ("other_shape", "gives (10,) for one image"),
        ("whole_numbers", "torch.int64"),
        ("without_memory", "meta device"),
        ("too_large", "cannot be built"),
        ("more_state", "no tensor"),
    ],
)
def test_a_factory_that_fails_leaves_or_makes_something_else_is_one_line(factory, says):
    text = refusal(lambda: build(f"own_factories:{factory}"), "own_factories", says)
    assert "\x1b" not in text


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("chain", ["Nets.Small.from_name", "Nets.Small.make", "nets.Small.make"])
def test_a_factory_is_reached_through_classes(chain):
    assert build(f"own_factories:{chain}")(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "chain",
    [
        "Nets.other",
        "Nets.Small.other.make",
        "Nets.number",
        "nets.late",
        "torch.hub.load",
        "sys.exit",
        "nn.Linear",
        "Nets.Small.from_name.__func__",
        "leaves.__globals__.clear",
        "__builtins__.clear",
        "__loader__.load_module",
        "tables",
        "",
        ".",
        "Nets.",
        "Nets..Small",
    ],
)
def test_a_chain_that_ends_nowhere_or_leads_into_another_package_is_one_line(chain):
    refusal(lambda: build(f"own_factories:{chain}"), "own_factories")


def test_a_chain_leads_through_the_packages_own_modules(tmp_path, monkeypatch):
    package = tmp_path / "own_package" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("from own_package import models")
    (package / "__init__.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for path in ("own_package:models.Nets.Small.make", "own_package.models:Nets.Small.make"):
            assert build(path)(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    finally:
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]


def test_a_module_with_another_name_of_its_own_is_used_under_the_one_given():
    assert models.import_factory("os.path:join") is os.path.join  # its own name is posixpath


@pytest.mark.parametrize(
    ("trusted", "covered"),
    [
        ("pkg", True),
        ("pkg.models", True),
        ("pkg.models.deep", True),
        ("pkg.models.deep.er", False),
        ("pkg.mod", False),
        ("pk", False),
        ("models", False),
        ("pkg.models.deep:make", False),
        ("", False),
        (".", False),
    ],
)
def test_trust_covers_a_package_with_what_is_below_it(trusted, covered):
    assert models.untrusted_module("pkg.models.deep:make", [trusted]) == (None if covered else "pkg.models.deep")
    assert models.untrusted_module("resnet8", [trusted]) is None


@pytest.mark.usefixtures("own")
def test_an_answer_that_is_no_tensor_is_not_blamed_on_the_class_count():
    assert "class count" not in refusal(lambda: build("own_factories:a_dict_of_others"))


WORDS = ["--num-classes", "10", "--image-shape", "1x16x16", "--mean", "0.5", "--std", "0.25"]


def imported(run_cli, tmp_path, factory):
    """`teacher import` of a network of `OWN`, with weights that its class gives."""
    network = getattr(importlib.import_module("own_factories"), factory)()
    if factory == "lazily":
        network(torch.zeros(1, 1, 16, 16))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    words = ["--architecture", f"own_factories:{factory}", *WORDS, "--out", str(tmp_path / "net")]
    return run_cli("teacher", "import", str(tmp_path / "w.pt"), *words), network


@pytest.mark.usefixtures("own")
def test_weights_of_lazy_layers_are_imported_and_come_back(tmp_path, run_cli):
    done, network = imported(run_cli, tmp_path, "lazily")
    assert done.code == 0, done.err
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(bundles.load(tmp_path / "net", "own_factories").network(images), network.eval()(images))


@pytest.mark.usefixtures("own")
def test_a_factory_that_gives_one_object_again_and_again_gives_networks_of_their_own():
    first, second = build("own_factories:always_the_same"), build("own_factories:always_the_same")
    first.linear.weight.data.zero_()  # type: ignore[operator, union-attr]
    assert second.linear.weight.any()  # type: ignore[operator, union-attr]


@pytest.mark.usefixtures("own")
def test_code_that_makes_another_network_of_the_same_weights_is_refused(tmp_path, run_cli):
    done, _ = imported(run_cli, tmp_path, "Drawn")
    assert_one_error(done, 2, "own_factories:Drawn", "another network")
    assert not (tmp_path / "net").exists()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("factory", "says"), [("tires", "RuntimeError: no luck"), ("walks_off", "SystemExit")])
def test_a_forward_that_fails_later_is_one_line_of_wrong_input(tmp_path, run_cli, factory, says):
    assert_one_error(imported(run_cli, tmp_path, factory)[0], 2, "own forward raised", says)


def test_ctrl_c_in_a_users_module_stays_ctrl_c(own):
    (own / "own_interrupt.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        build("own_interrupt:make")


def test_a_command_ends_with_its_own_exit_code_when_a_factory_leaves(own, run_cli, monkeypatch):
    monkeypatch.chdir(own)
    done = run_cli("teacher", "init", "own_factories:leaves", "--out", str(own / "out"), "--image-shape", "1x16x16")
    assert done.code == 2 and done.err.count("\n") == 1 and not (own / "out").exists()


def test_too_large_an_architecture_in_a_bundle_is_refused(tmp_path, tiny_teacher):
    (tmp_path / "net").mkdir()
    for name in ("teacher.json", "weights.safetensors"):
        text = (tiny_teacher / name).read_bytes()
        (tmp_path / "net" / name).write_bytes(
            text.replace(b'"resnet8"', b'"wrn_16_99999"').replace(b"0.5\n  }", b"1\n}")
        )
    refusal(lambda: bundles.load(str(tmp_path / "net")))
