"""Source of networks of users' own, made of parts that are drawn independently: what `networks` hands in.

Each part may be one that every network is free to have, one that no network may have (`BAD`), or one that may be taken
or refused (`OPEN`).
"""

import random
from dataclasses import dataclass, field

BAD, OPEN = "bad", "open"

HEAD = """import functools
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

SHAPE, CLASSES, FINAL, DTYPE = {shape}, {classes}, {final}, torch.{dtype}
warnings.simplefilter("ignore")  # PyTorch's, of what is deprecated
Named = namedtuple("Named", ["logits", "extra"])
SEEN = {{}}


@dataclass
class Output:
    logits: torch.Tensor
    loss: object = None


class BNAct(nn.BatchNorm{d}d):
    def forward(self, x):
        return F.relu(super().forward(x))


class BNDrop(nn.BatchNorm{d}d):
    def __init__(self, width):
        super().__init__(width)
        self.act, self.drop = nn.ReLU6(), nn.Dropout(0.1)

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.drop(self.act(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Standardised(nn.Module):
    def forward(self, weight):
        return weight / (weight.flatten(1).std(1).view(-1, *[1] * (weight.ndim - 1)) + 1e-3)


def keep(module, given, answer):
    SEEN[type(module).__name__] = answer


def half(module, given, answer):
    return answer / 2


def shifted(module, given):
    return (given[0] + 0.5,)


class Net(nn.Module):
    def __init__(self, width={width}):
        super().__init__()
"""


@dataclass
class Source:
    """A module's text in the making, and what is known of its network."""

    rng: random.Random
    made: list[str] = field(default_factory=list)  # lines of `__init__`
    after: list[str] = field(default_factory=list)  # its last lines
    passed: list[str] = field(default_factory=list)  # lines of `forward`
    verdicts: set[str] = field(default_factory=set)
    of_factory: str = ""  # the verdict on the factory alone
    parts: list[str] = field(default_factory=list)  # names of the parts, for a failure's message
    has_statistics: bool = False
    final: dict[str, str | None] = field(default_factory=lambda: {"eval": None, "train": None})
    dtype: str = "float32"
    signals: bool = False
    shape: tuple[int, ...] = ()
    classes: int = 2
    answer: str = "y"  # the expression that `forward` returns
    train_answer: str = "y"
    taken: str = "answer"  # the logits in it
    train_taken: str = "answer"
    arguments: str = "x"

    def part(self, name: str, verdict: str = "") -> None:
        """Note a part of the network."""
        self.parts.append(name)
        if verdict:
            self.verdicts.add(verdict)

    @property
    def is_lazy(self) -> bool:
        """Whether a layer gets its weights in its first pass."""
        return any("lazy" in part for part in self.parts)

    def maybe(self, share: float) -> bool:
        """Whether something is so."""
        return self.rng.random() < share


def write(rng: random.Random) -> tuple[str, str, Source]:
    """The text of the module, the name of its factory, and what is known of the network."""
    s = Source(rng)
    s.signals, s.classes = s.maybe(0.25), rng.randint(2, 5)
    channels = rng.randint(1, 3)
    s.shape = (channels, rng.choice([16, 24])) if s.signals else (channels, *rng.choice([(8, 8), (8, 8), (16, 8)]))
    width = rng.choice([4, 4, 6])
    if s.maybe(0.15):
        normalise_inside(s)
    body(s, width)
    pool_and_flatten(s, width)
    head(s)
    if s.maybe(0.3):
        habits(s)
    outputs(s)
    if s.maybe(0.3):
        computed(s)
    if s.maybe(0.15):
        shared(s)
    if s.maybe(0.15):
        hooks(s)
    if s.maybe(0.1) and not s.is_lazy:
        precision(s)
    if s.maybe(0.15) and not s.is_lazy:  # nothing is frozen that is not there
        s.after.append(rng.choice(["self.conv0.requires_grad_(False)", "self.requires_grad_(False)"]))
        s.part("frozen")
    name, outer = factory(s)
    text = HEAD.format(
        shape=s.shape, classes=s.classes, final=s.final, dtype=s.dtype, d=1 if s.signals else 2, width=width
    )
    text += "".join(f"        {line}\n" for line in (*s.made, *s.after))
    text += "\n    def note(self, module, given, answer):\n        self.seen += 1\n"
    text += f"\n    def forward(self, {s.arguments}):\n" + "".join(f"        {line}\n" for line in s.passed)
    if s.train_answer != s.answer:
        text += f"        if self.training:\n            return {s.train_answer}\n"
    text += f"        return {s.answer}\n\n\n"
    text += f"def logits(answer, training):\n    return {s.train_taken} if training else {s.taken}\n\n\n"
    wrapped = wrapper(s)
    text += wrapped + outer
    return text, name, s


def normalise_inside(s: Source) -> None:
    """Mean and std of the images as buffers, or as plain tensors."""
    ones = ", ".join(["1"] * (len(s.shape) - 1))
    kind = s.rng.choice(["persistent", "not persistent", "attribute", "drawn"])
    value = f"torch.full(({s.shape[0]}, {ones}), 0.4)"
    if kind == "attribute":
        s.made.append(f"self.mean = {value}")
    elif kind == "drawn":  # another one in each network of this code
        s.made.append(f"self.register_buffer('mean', torch.rand({s.shape[0]}, {ones}), persistent=False)")
    else:
        s.made.append(f"self.register_buffer('mean', {value}, persistent={kind == 'persistent'})")
    s.passed.append("x = (x - self.mean) / 0.3")
    s.part(f"inner normalisation: {kind}", BAD if kind == "drawn" else "")


def norms(s: Source, width: int) -> tuple[str, str]:
    """A normalisation layer and what it is called."""
    d = 1 if s.signals else 2
    with_statistics = {
        "plain": f"nn.BatchNorm{d}d({width})",
        "subclass": f"BNAct({width})",
        "more in it": f"BNDrop({width})",
        "not affine": f"nn.BatchNorm{d}d({width}, affine=False)",
        "no momentum": f"nn.BatchNorm{d}d({width}, momentum=None)",
        "sync": f"nn.SyncBatchNorm({width})",
        "lazy": f"nn.LazyBatchNorm{d}d()",
        "instance with statistics": f"nn.InstanceNorm{d}d({width}, track_running_stats=True)",
    }
    without = {
        "batch without statistics": f"nn.BatchNorm{d}d({width}, track_running_stats=False)",
        "instance": f"nn.InstanceNorm{d}d({width}, affine=True)",
        "group": f"nn.GroupNorm(2, {width})",
        "layer": f"nn.GroupNorm(1, {width})",
        "none": "nn.Identity()",
    }
    name = s.rng.choice(["plain"] * 8 + [*with_statistics] * 2 + [*without])
    if name in with_statistics:
        s.has_statistics |= name != "instance with statistics"
        return name, with_statistics[name]
    if name == "batch without statistics":
        s.verdicts.add(OPEN)  # its answer to an image depends on the others in the batch
    return name, without[name]


def body(s: Source, width: int) -> None:
    """Convolutions, each with a normalisation and an activation."""
    conv = "nn.Conv1d" if s.signals else "nn.Conv2d"
    channels = s.shape[0]
    for index in range(s.rng.choice([1, 2, 2, 3])):
        first = channels if index == 0 else width
        kinds = {
            "plain": f"{conv}({first}, {width}, 3, padding=1, bias={s.maybe(0.5)})",
            "dilated": f"{conv}({first}, {width}, 3, padding=2, dilation=2)",
            "transposed": f"{conv.replace('Conv', 'ConvTranspose')}({first}, {width}, 3, padding=1)",
            "reflecting": f"{conv}({first}, {width}, 3, padding=1, padding_mode='reflect')",
            "same": f"{conv}({first}, {width}, 3, padding='same')",
        }
        if index:
            kinds |= {
                "depthwise": f"{conv}({width}, {width}, 3, padding=1, groups={width})",
                "grouped": f"{conv}({width}, {width}, 3, padding=1, groups=2)",
            }
        kind = s.rng.choice(["plain", "plain", *kinds])
        norm, layer = norms(s, width)
        activation = s.rng.choice(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()", "nn.LeakyReLU(0.1)"])
        s.made += [f"self.conv{index} = {kinds[kind]}", f"self.bn{index} = {layer}", f"self.act{index} = {activation}"]
        way = s.rng.choice(["x", "x", "skip"]) if index else "x"
        call = f"self.act{index}(self.bn{index}(self.conv{index}(x)))"
        if norm == "subclass" and "inplace" in activation:
            s.verdicts.add(BAD)  # PyTorch has no gradient for it: the activation overwrites what the layer has kept
        s.passed.append(f"x = x + {call}" if way == "skip" else f"x = {call}")
        s.part(f"{kind} convolution, norm {norm}")
    if s.maybe(0.1):
        s.made += ["self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()"]
        s.passed[-1:] = ["x = self.quant(x)", s.passed[-1], "x = self.dequant(x)"]
        s.part("quantisation stubs")


def pool_and_flatten(s: Source, width: int) -> None:
    """Pooling and the way to the classifier."""
    d = 1 if s.signals else 2
    pool = s.rng.choice(["adaptive", "mean", "strided"])
    size = width
    if pool == "adaptive":
        s.passed.append(f"x = F.adaptive_avg_pool{d}d(x, 2)")
        size = width * 2**d
    elif pool == "mean":
        s.passed.append(f"x = x.mean({list(range(2, 2 + d))}, keepdim=True)")
    else:
        s.passed.append(f"x = F.max_pool{d}d(x, 4)")
        for side in s.shape[1:]:
            size *= side // 4
    flat = s.rng.choice(["x.flatten(1)", "x.view(x.size(0), -1)", "x.reshape(len(x), -1)", "torch.flatten(x, 1)"])
    s.passed.append(f"x = {flat}")
    s.part(f"{pool} pooling, {flat}")
    s.made.append(f"self.size = {size}")
    if s.maybe(0.3):
        s.made += [f"self.hidden = nn.Linear({size}, {width})"]
        kind = s.rng.choice([f"nn.BatchNorm1d({width})", f"nn.LayerNorm({width})", "nn.Dropout(0.2)", "nn.Identity()"])
        s.has_statistics |= "Batch" in kind
        s.made += [f"self.mid = {kind}", f"self.size = {width}"]
        s.passed.append("x = F.relu(self.mid(self.hidden(x)))")
        s.part(f"hidden layer, {kind}")


def head(s: Source) -> None:
    """The classifier."""
    s.made.append("self.fc, self.aux = nn.Linear(self.size, CLASSES), nn.Linear(self.size, CLASSES)")
    s.passed += ["features = x", "y = self.fc(x)"]


def outputs(s: Source) -> None:
    """What forward returns."""
    if s.maybe(0.3):
        kind = s.rng.choice(
            ["softmax", "sigmoid", "log_softmax", "softmax in eval mode", "sigmoid in eval mode", "softmax of doubles"]
        )
        call = {"sigmoid": "y.sigmoid()", "log_softmax": "F.log_softmax(y, 1)"}.get(
            kind.partition(" ")[0], "y.softmax(1)"
        )
        call = "y.double().softmax(-1).float()" if kind.endswith("doubles") else call
        of_eval = kind.endswith("mode")
        s.passed.append(f"y = y if self.training else {call}" if of_eval else f"y = {call}")
        if kind.startswith(("softmax", "sigmoid")):
            s.final["eval"] = kind.partition(" ")[0]
            s.final["train"] = None if of_eval else s.final["eval"]
        s.part(f"ends in {kind}")
    kinds: dict[str, tuple[str, str, str]] = {
        "tuple": ("(y, features)", "answer[0]", ""),
        "list": ("[features[:, :1], y]", "answer[1]", ""),
        "dict": ("{'aux': self.aux(features), 'logits': y}", "answer['logits']", ""),
        "dict of out": ("{'aux': self.aux(features), 'out': y}", "answer['out']", ""),
        "named tuple": ("Named(y, features)", "answer.logits", ""),
        "dataclass": ("Output(y)", "answer.logits", ""),
        "axes of length 1": ("y[:, :, None, None]", "answer[:, :, 0, 0]", ""),
        "too few classes": ("y[:, :-1]", "answer", BAD),
        "one image": ("y[:1]", "answer", BAD),
        "no batch": ("y.flatten()", "answer", BAD),
        "a map": ("y[:, :, None, None].expand(-1, -1, 2, 2)", "answer", BAD),
        "integers": ("y.argmax(1)", "answer", BAD),
        "long logits": ("(100 * y).long()", "answer", BAD),
        "nothing": ("None", "answer", BAD),
        "nan": ("y * float('nan')", "answer", OPEN),
        "infinite": ("y / 0", "answer", OPEN),
        "nan at times": ("torch.where(y > 0.5, y * float('inf') * 0, y)", "answer", OPEN),
        "detached": ("y.detach()", "answer", BAD),
        "half": ("y.half()", "answer", OPEN),
        "doubles": ("y.double()", "answer", ""),
    }
    if "inner normalisation: drawn" in s.parts:  # which the others hide
        kinds = {name: kind for name, kind in kinds.items() if kind[2] != OPEN}
    good = [name for name, (_, _, verdict) in kinds.items() if not verdict]
    if s.maybe(0.45):
        name = s.rng.choice([*kinds, *good * 3])
        answer, taken, verdict = kinds[name]
        mode = s.rng.choice(["train", "eval", "both", "both"]) if verdict != BAD else s.rng.choice(["train", "both"])
        if mode != "train":
            s.answer, s.taken = answer, taken
        if mode != "eval":
            s.train_answer, s.train_taken = answer, taken
        s.part(f"gives {name} in {mode} mode", verdict)


def computed(s: Source) -> None:
    """Weights that are computed from other tensors."""
    kinds = {
        "weight norm": "parametrizations.weight_norm({})",
        "old weight norm": "nn.utils.weight_norm({})",
        "spectral norm": "parametrizations.spectral_norm({})",
        "old spectral norm": "nn.utils.spectral_norm({})",
        "doubled": "parametrize.register_parametrization({}, 'weight', Doubled())",
        "standardised": "parametrize.register_parametrization({}, 'weight', Standardised())",
        "two": "[parametrize.register_parametrization({0}, 'weight', Doubled()) for _ in range(2)]",
        "bias": "parametrize.register_parametrization(self.fc, 'bias', Doubled())",
        "orthogonal": "parametrizations.orthogonal(self.fc)",
        "pruned": "prune.l1_unstructured({}, 'weight', 0.3)",
        "pruned twice": "[prune.random_unstructured({}, 'weight', 0.2) for _ in range(2)]",
        "pruned for good": "prune.remove(prune.l1_unstructured({}, 'weight', 0.3), 'weight')",
        "pruned channels": "prune.ln_structured({}, 'weight', 0.3, n=2, dim=0)",
    }
    for _ in range(s.rng.choice([1, 1, 2])):
        name, layer = s.rng.choice(list(kinds)), s.rng.choice(["self.conv0", "self.fc"])
        layer = "self.fc" if name in ("bias", "orthogonal") else layer
        if f"computed: {layer}" in s.parts:
            continue
        s.after.append(kinds[name].format(layer))
        s.parts += [f"computed: {layer}", name]


def shared(s: Source) -> None:
    """One module or tensor under several names."""
    kinds = {
        "alias": ["self.stem = nn.Sequential(self.conv0, self.bn0)"],
        "list": ["self.layers = nn.ModuleList([self.conv0, self.bn0, self.fc])"],
        "tied": ["self.aux.weight = self.fc.weight"],
        "tied bias": ["self.register_parameter('offset', self.fc.bias)"],
        "dict": ["self.by_name = nn.ModuleDict({'first': self.conv0})"],
        "hidden list": ["self.hidden_layers = [self.conv0, self.bn0]"],
        "itself": ["self.others = [self]"],
    }
    name = s.rng.choice(list(kinds))
    s.made += kinds[name]
    s.part(f"shared: {name}")


def habits(s: Source) -> None:
    """What forward does besides."""
    kinds: dict[str, tuple[list[str], list[str], str]] = {
        "dropout": (["self.drop = nn.Dropout(0.3)"], ["y = self.drop(y)"], ""),
        "dropout always on": ([], ["y = F.dropout(y, 0.5)"], BAD),
        "noise always on": ([], ["y = y + torch.randn_like(y)"], BAD),
        "keeps its features": (["self.last = None"], ["self.last = features"], ""),
        "keeps a list": (["self.kept = []"], ["self.kept = [features, y]"], OPEN),
        "keeps a dict": (["self.kept = {}"], ["self.kept['y'] = y"], OPEN),
        "counts its calls": (["self.calls = 0"], ["self.calls += 1"], ""),
        "counts in a buffer": (["self.register_buffer('calls', torch.zeros((), dtype=torch.long))"],
                               ["self.calls += 1"], ""),
        "counts beside the state": (
            ["self.register_buffer('calls', torch.zeros(1), persistent=False)"], ["self.calls.add_(1)"], ""),
        "drifts": (["self.calls = 0"], ["self.calls += 1", "y = y * (1 + 0.1 * self.calls)"], BAD),
        "drifts in a buffer": (["self.register_buffer('calls', torch.zeros(1))"],
                               ["self.calls += 1", "y = y * (1 + self.calls)"], BAD),
        "drifts in train mode": (["self.register_buffer('mean_y', torch.zeros(CLASSES))"],
                                 ["if self.training:", "    self.mean_y.lerp_(y.detach().mean(0), 0.1)",
                                  "y = y - self.mean_y"], ""),
        "raises now and then": (["self.calls = 0"], ["self.calls += 1", "if self.calls % 7 == 0:",
                                                     "    raise RuntimeError('no luck\\nthis time')"], OPEN),
        "raises later": (["self.calls = 0"], ["self.calls += 1", "if self.calls > 30:",
                                              "    raise IndexError"], OPEN),
        "raises in train mode": ([], ["if self.training:", "    raise NotImplementedError"], BAD),
        "raises for one image": ([], ["assert len(x) > 1"], BAD),
        "raises for many images": ([], ["assert len(x) < 3"], OPEN),
        "asks for values": ([], ["if y.sum() > 1e9:", "    y = y * 2"], ""),
        "no gradient": ([], ["with torch.no_grad():", "    y = self.fc(features)"], BAD),
        "prints": ([], ["print('forward', tuple(x.shape))"], ""),
        "numpy": ([], ["y = y * float(x.detach().numpy().shape[0] > 0)"], ""),
        "leaves": ([], ["if len(x) > 2:", "    sys.exit(5)"], OPEN),
    }  # fmt: skip
    name = s.rng.choice(list(kinds))
    made, passed, verdict = kinds[name]
    s.made += made
    s.passed += passed
    s.part(name, verdict)
    if s.maybe(0.15):
        more = s.rng.choice(["targets=None", "*others", "**options"] + ["mask"] * (not s.is_lazy))
        s.arguments = f"x, {more}"
        s.part(f"forward takes {more}", BAD if more == "mask" else "")


def hooks(s: Source) -> None:
    """Hooks on modules: they stay, as they change what the network gives."""
    kinds = {
        "keeps what it sees": ["self.conv0.register_forward_hook(keep)"],
        "halves": ["self.fc.register_forward_hook(half)"],
        "shifts": ["self.fc.register_forward_pre_hook(shifted)"],
        "of the network": ["self.register_forward_pre_hook(shifted)"],
        "bound": [
            "self.seen = 0",
            "self.bn0.register_forward_hook(self.note)",
        ],
        "lambda": ["self.act0.register_forward_hook(lambda module, given, answer: answer * 2)"],
        "backward": ["self.fc.register_full_backward_hook(lambda module, before, after: None)"],
        "on BatchNorm": ["self.bn0.register_forward_hook(half)"],
        "before BatchNorm": ["self.bn0.register_forward_pre_hook(shifted)"],
    }
    name = s.rng.choice(list(kinds))
    s.after += kinds[name]
    s.part(f"hook: {name}")


def precision(s: Source) -> None:
    """Weights of another type."""
    s.dtype = s.rng.choice(["float64", "float16", "bfloat16"])
    s.after.append(f"self.to(torch.{s.dtype})")
    s.part(s.dtype)


def wrapper(s: Source) -> str:
    """Perhaps a module around the network, whose name for it is one that wrappers have."""
    if not s.maybe(0.25):
        return "Outer = Net\n\n\n"
    name = s.rng.choice(["module", "model", "_orig_mod", "_orig_mod", "net"])
    more = s.rng.choice(["", "", " * 0.5"])
    s.part(f"inside, called {name}{more}")
    return (
        "class Outer(nn.Module):\n    def __init__(self, *given, **named):\n        super().__init__()\n"
        f"        self.{name} = Net(*given, **named)\n\n"
        f"    def forward(self, x):\n        return self.{name}(x{more})\n\n\n"
    )


def factory(s: Source) -> tuple[str, str]:
    """The name of what makes the network, and its text."""
    if s.maybe(0.1):
        bad = {
            "raise ValueError('no weights here')": "make",
            "raise KeyError('a\\nb')": "make",
            "sys.exit(3)": "make",
            "return None": "make",
            "return Outer": "make",
            "return Outer(), 3": "make",
            "return Outer().state_dict()": "make",
            "return nn.Sequential()": "make",
            "assert False": "make",
        }
        line = s.rng.choice(list(bad))
        s.part(f"factory: {line}")
        s.of_factory = BAD
        return "make", f"def make():\n    {line}\n"
    if s.maybe(0.06):
        name = s.rng.choice(["nothing", "SHAPE", "Zoo.nothing", "nn.Linear", "", "needs", "os.system", "__name__"])
        s.part(f"factory called {name}")
        s.of_factory = BAD
        return name, "class Zoo:\n    pass\n\n\ndef needs(depth):\n    return Outer()\n"
    kinds = {
        "make": "def make():\n    return Outer()\n",
        "Outer": "",
        "small": "small = lambda: Outer()\n",
        "part": "part = functools.partial(Outer)\n",
        "Zoo.small": "class Zoo:\n    @classmethod\n    def small(cls):\n        return Outer()\n",
        "Zoo.Inner.make": "class Zoo:\n    class Inner:\n        @staticmethod\n        def make():\n"
        "            return Outer()\n",
        "talks": "def talks():\n    print('building', end='')\n    print()\n    return Outer()\n",
        "once": "@functools.lru_cache\ndef once():\n    return Outer()\n",
        "THE": "NET = Outer()\n\n\ndef THE():\n    return NET\n",
        "trained": "def trained():\n    return Outer().train()\n",
        "closed": "def closed():\n    net = Outer()\n    own = net.forward\n"
        "    net.forward = lambda *given: own(*given)\n    return net\n",
        "scripted": "def scripted():\n    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))\n",
        "parallel": "def parallel():\n    return nn.DataParallel(Outer())\n",
    }
    if "inner normalisation: drawn" in s.parts:  # made once, it is another one in the next process only
        del kinds["once"], kinds["THE"]
    name = s.rng.choice(["make"] * 8 + ["Outer", *kinds])
    s.of_factory = {"closed": BAD, "scripted": BAD, "parallel": OPEN}.get(name, "")
    s.part(f"factory: {name}")
    return name, kinds[name]
