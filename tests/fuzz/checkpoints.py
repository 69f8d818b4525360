"""Generator of checkpoints as training scripts leave them: of a known network, whose weights are looked for in them.

Each has sets of weights at known places. The one that `teacher import` says it took is the one that the bundle holds.
"""

import argparse
import collections
import datetime
import io
import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd_ray.bundles import matching
from fuzz.bundle_files import imported
from fuzz.damage import MARKS
from fuzz.fuzzing import Case, Desk

State = dict[str, Tensor]
KEYS = ("state_dict", "model", "net", "model_state_dict", "checkpoint", "student", "weights", "a.b", "réseau", "")
AVERAGES = ("ema", "model_ema", "ema_state_dict", "swa_model", "shadow_params", "average")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.net.", "a.b.c.")
ENDINGS = (".pt", ".pt", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".PT", ".tar", "")


class Config:
    """An object of the training script's."""

    depth = 3


@dataclass
class Checkpoint:
    """A file's content in the making, and what is known of it."""

    rng: random.Random
    content: Any = None
    sets: dict[str, State] = field(default_factory=dict)  # place -> the network's state dict
    places: dict[str, tuple[str, str]] = field(default_factory=dict)  # place -> key and prefix as they are said
    averaged: list[str] = field(default_factory=list)  # places of averages
    bad: bool = False
    is_ambiguous: bool = False  # two sets fit, and neither is of averages
    is_open: bool = False

    def add(self, key: str, prefix: str, state: State) -> str:
        """Note a set of weights; its place."""
        place = ".".join(filter(None, (key, prefix.removesuffix("."))))
        self.sets[place], self.places[place] = state, (matching.shown(key) if key else "", prefix)
        return place


def checkpoints(rng: random.Random, desk: Desk) -> Case:
    """A file with the weights of the template, somewhere; for `teacher import`."""
    from safetensors.torch import load_file

    c = Checkpoint(rng)
    state = {name: t + 1 for name, t in load_file(desk.templates / "teacher" / "weights.safetensors").items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of what is deprecated
        state = tensors(c, state)
    named, prefix = names(c, state)
    ending = rng.choice(ENDINGS)
    if rng.random() < 0.15:
        c.add("", prefix, state)
        ending, content = rng.choice([".safetensors", ".SAFETENSORS"]), named
    else:
        content = wrapped(c, named, prefix, state)
    data = written(c, content, ending)
    file = f"weights{ending}"
    desk.file(file, data)
    case = imported(rng, file)
    words = [*case.words, *key_words(c)]
    of_key = "--weights-key" in words
    told = {"places": c.places, "unsaid": [] if of_key else c.averaged}
    told["wanted"] = [place for place in c.sets if of_key or place not in c.averaged]
    desk.file("told.json", json.dumps(told))
    if not c.bad:
        torch.save({place: {name: t.detach().clone() for name, t in s.items()} for place, s in c.sets.items()},
                   desk.work / "sets.pt")  # fmt: skip
    codes = {2} if c.bad or c.is_ambiguous else {0, 2} if c.is_open else {0}
    return replace(case, words=words, codes=frozenset(codes), encoding="utf-8", by="oracles:checkpoint")


def tensors(c: Checkpoint, state: State) -> State:
    """The weights, perhaps of another kind."""
    good = ["plain"] * 8 + ["half", "bfloat16", "double", "strided", "storage", "parameters", "no counters"]
    good += ["short counters", "transposed"]
    wrong = ["missing", "extra", "near", "odd names", "shape", "nan", "whole numbers", "bits", "sparse", "quantised"]
    wrong += ["meta", "complex", "expanded"]
    kind = c.rng.choice(good if c.rng.random() < 0.75 else wrong)
    floats = [name for name, t in state.items() if t.is_floating_point()]
    name = c.rng.choice(floats)
    if kind in ("half", "bfloat16", "double"):
        dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[kind]
        return {n: t.to(dtype) if n in floats and (kind != "half" or c.rng.random() < 0.9) else t
                for n, t in state.items()}  # fmt: skip
    if kind == "strided":
        return {n: t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], -1)[..., 0] for n, t in state.items()}
    if kind == "storage":
        flat, at = torch.cat([state[n].flatten() for n in floats]), 0
        views = {}
        for n in floats:
            views[n] = flat[at : at + state[n].numel()].view(state[n].shape)
            at += state[n].numel()
        return {n: views.get(n, t) for n, t in state.items()}
    if kind == "parameters":
        return {n: nn.Parameter(t) if n in floats else t for n, t in state.items()}
    if kind == "no counters":
        return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    if kind == "short counters":
        return {n: t.to(torch.int32) if n.endswith("num_batches_tracked") else t for n, t in state.items()}
    if kind == "transposed":
        name = c.rng.choice([n for n in floats if state[n].ndim > 1])
        turned = state[name].transpose(0, 1)
        c.bad |= turned.shape != state[name].shape
        return {**state, name: turned}
    if kind == "plain":
        return state
    c.bad = True
    value = state[name]
    if kind == "missing":
        return {n: t for n, t in state.items() if n != name}
    if kind == "extra":
        return {**state, c.rng.choice(["fc2.weight", f"{name}.more", "extra", "layer9.0.conv1.weight"]): value.clone()}
    if kind == "near":
        return {**state, **{f"{name[:-1]}{i}": torch.zeros(1) for i in range(c.rng.choice([3, 300, 900]))}}
    if kind == "odd names":
        return {**state, c.rng.choice([*MARKS, "", ".", "a" * 3000, "..", "x." * 400]): value.clone()}
    made = {
        "shape": lambda t: t[..., None],
        "nan": lambda t: t * c.rng.choice([float("nan"), float("inf")]),
        "whole numbers": lambda t: t.round().long(),
        "bits": lambda t: t > 0,
        "sparse": lambda t: t.to_sparse(),
        "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "meta": lambda t: t.to("meta"),
        "complex": lambda t: t.to(torch.complex64),
        "expanded": lambda t: t.expand(2, *t.shape),
    }
    return {**state, **{n: made[kind](state[n]) for n in (floats if c.rng.random() < 0.3 else [name])}}


def names(c: Checkpoint, state: State) -> tuple[State, str]:
    """The weights under the names of a file, and the prefix of all."""
    kind = c.rng.choice(["plain"] * 4 + ["prefix"] * 5 + ["within", "some"])
    if kind == "plain":
        return state, ""
    prefix = c.rng.choice(PREFIXES)
    if kind == "prefix":
        return prefixed(state, prefix), prefix
    if kind == "within":  # as FSDP and activation checkpointing do
        wrapper = c.rng.choice(["module", "_fsdp_wrapped_module", "_orig_mod"])
        return {n.replace(".", f".{wrapper}.", 1) if "conv" in n else n: t for n, t in state.items()}, ""
    c.is_open = True
    return {prefix + n if c.rng.random() < 0.5 else n: t for n, t in state.items()}, ""


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    """A state dict below a prefix."""
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State, seed: int) -> State:
    """Weights of other values."""
    return {name: t + seed if t.is_floating_point() and not t.is_quantized else t for name, t in state.items()}


def wrapped(c: Checkpoint, named: State, prefix: str, state: State) -> Any:
    """The content of a training script's file, with what lies beside the weights."""
    rng = c.rng
    keys = [key for key in rng.sample(KEYS, rng.choice([0, 1, 1, 1, 2, 3])) if key]
    content: Any = dict(named) if rng.random() < 0.5 else collections.OrderedDict(named)
    key = ".".join(keys)
    for one in reversed(keys):
        content = {one: content}
    c.add(key, prefix, state)
    if not keys:
        if rng.random() < 0.2:
            content = {**content, "epoch": 3, "best": 0.5}
        elif rng.random() < 0.1:
            content, key = [3, content], "1"
            c.sets, c.places = {}, {}
            c.add(key, prefix, state)
        return content
    if rng.random() < 0.25 and not c.bad and not c.is_open:
        average(c, content, named, prefix, state)
    if rng.random() < 0.12 and not c.bad and not c.is_open:
        same = rng.random() < 0.4
        second = named if same else other(named, 7)
        content["best"] = {n: t.detach().clone() for n, t in second.items()}
        c.add("best", prefix, state if same else other(state, 7))
        c.is_ambiguous = not same
    content |= beside(c)
    return content


def average(c: Checkpoint, content: dict[str, Any], named: State, prefix: str, state: State) -> None:
    """Averages over training steps beside the weights."""
    key, plain = c.rng.choice(AVERAGES), c.rng.random() < 0.5
    mean = other(state, 3)
    content[key] = mean if plain else other(named, 3)
    if c.rng.random() < 0.3:
        content[key] = {"n_averaged": torch.tensor(5), **prefixed(mean, "module.")}
        c.averaged.append(c.add(key, "module.", mean))
    else:
        c.averaged.append(c.add(key, "" if plain else prefix, mean))


def beside(c: Checkpoint) -> dict[str, Any]:
    """What training scripts keep beside the weights."""
    network = nn.Linear(2, 2)
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1)
    good: dict[str, Any] = {
        "optimizer": optimiser.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 12,
        "best_acc": np.float64(0.93),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=0.1, wd=None, out=PurePosixPath("runs/1")),
        "rng": torch.get_rng_state(),
        "hyper_parameters": {"width": 3, "names": ["a", "b"], "nothing": None, "rate": 1e-3},
        "loss": torch.tensor(0.5),
        "shape": torch.Size([3, 4]),
        "\x1b[31m": "red",
        "teacher_head": {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
        "many": {f"layer1.0.conv1.weight{i}": torch.zeros(1) for i in range(300)},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "deep": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": torch.ones(2)}}}}}}}}},
    }
    uncertain: dict[str, Any] = {
        "when": datetime.datetime(2026, 1, 2),
        "config": Config(),
        "class": Config,
        "counts": collections.Counter("abc"),
        "table": collections.defaultdict(list),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "set": {1, 2},
        "complex": 1j,
        "bytes": b"abc",
        "function": torch.relu,
        "range": range(3),
        "tensor of another type": torch.zeros(2).to_sparse(),
        "generator": torch.Generator().get_state(),
        "object array": np.array([None, "a"], dtype=object),
        "strings": np.array(["a", "bc"]),
        "module": network,
    }
    found = {name: good[name] for name in c.rng.sample(sorted(good), c.rng.choice([0, 1, 3, 6]))}
    if c.rng.random() < 0.15:
        name = c.rng.choice(sorted(uncertain))
        found[name] = uncertain[name]
        c.is_open = True
    return found


def written(c: Checkpoint, content: Any, ending: str) -> bytes:
    """The bytes of a file with this content, perhaps cut, or of another thing altogether."""
    rng, buffer = c.rng, io.BytesIO()
    if ending.lower() == ".safetensors":
        kinds = {t.layout for t in content.values()} | {t.is_quantized for t in content.values()}
        kinds |= {t.is_meta for t in content.values()}
        if kinds <= {torch.strided, False}:
            data = safetensors.torch.save({n: t.detach().contiguous().clone() for n, t in content.items()})
        else:
            c.bad, data = True, b""
        return cut(c, data)
    kind = rng.choice(["zip"] * 20 + ["legacy"] * 8 + ["scripted", "whole", "nothing"])
    if kind in ("scripted", "whole", "nothing"):
        c.bad = True
        network = nn.Sequential(nn.Linear(2, 2))
        if kind == "scripted":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.save(torch.jit.script(network), buffer)
            return buffer.getvalue()
        content = network if kind == "whole" else rng.choice([{}, [], None, {"state_dict": {}}, {"a": 1}, Config()])
    try:
        torch.save(content, buffer, _use_new_zipfile_serialization=kind != "legacy")
    except (RuntimeError, NotImplementedError):
        c.bad, buffer = True, io.BytesIO()
    return cut(c, buffer.getvalue())


def cut(c: Checkpoint, data: bytes) -> bytes:
    """A file whose copying was interrupted, now and then."""
    if c.rng.random() > 0.05:
        return data
    c.bad = True
    return data[: c.rng.randrange(max(1, len(data) - 30))]


def key_words(c: Checkpoint) -> list[str]:
    """Perhaps the option that names a place."""
    if c.rng.random() > 0.15:
        return []
    place = c.rng.choice([*c.sets, *c.sets, *c.averaged, "nothing.here", "\x1b[31m"])
    c.bad |= place not in c.sets
    if place in c.sets:
        c.sets, c.places, c.is_ambiguous = {place: c.sets[place]}, {place: c.places[place]}, False
    return ["--weights-key", place]
