"""Generator of networks of users' own, with weights: for `teacher import`, `recover`, and in memory."""

import json
import random
import warnings
from typing import Any

import torch

from fuzz import user_code
from fuzz.fuzzing import Case, Desk
from fuzz.templates import SETTINGS, TINY
from helpers import randomise_statistics

WRITES = ["work/target", "work/done", "work/cache", "work/__pycache__"]
RECOVER = ["recover", "target", "--out", "done", "--cache", "cache", "--trust-code", "own_nets"]
TRIED = 1 / 3  # of the networks are recovered too


def networks(rng: random.Random, desk: Desk) -> Case:
    """A network of the user's own, by import path or in memory."""
    text, name, source = user_code.write(rng)
    desk.file("own_nets.py", text)
    torch.manual_seed(rng.randrange(2**31))
    space: dict[str, Any] = {"__name__": "own_nets"}
    with warnings.catch_warnings():
        exec(compile(text, "own_nets.py", "exec"), space)  # text of this generator's
        state, damage = weights(rng, space, source)
    torch.save(state, desk.work / "weights.pt")
    in_memory = rng.random() < 0.3 and not any("drawn" in part for part in source.parts)
    verdicts = source.verdicts | ({source.of_factory} if not in_memory else set())
    bad, is_open = user_code.BAD in verdicts or damage, user_code.OPEN in verdicts
    final = source.final["eval"]
    head = final if final and rng.random() < 0.9 else rng.choice(["softmax", "softmax", "softmax", "sigmoid"])
    bad |= bool(final and head != final)
    recovered = rng.random() < TRIED
    sparsity = rng.choice([0.3, 0.5, 0.75, 0.9])
    described = {"num_classes": source.classes, "mean": 0.5, "std": 0.25, "head": head, "image_shape": source.shape}
    told = {
        "described": described,
        "image_shape": source.shape if not source.signals else (source.shape[0], 1, source.shape[1]),
        "training": rng.random() < 0.3,
        "steady": True,
        "differs": True,
        "compare_train": not is_open and not any("spectral" in part for part in source.parts),
        "sparsity": sparsity,
        "settings": SETTINGS,
        "recover": [*RECOVER, "--sparsity", str(sparsity), *TINY] if recovered else [],
        "open": is_open,
    }
    desk.file("told.json", json.dumps(told, indent=1))
    codes = {0, 2} if is_open or (recovered and not source.has_statistics) else {0}
    codes |= {1} if is_open else set()
    codes = {2} if bad else codes
    shape = "x".join(map(str, source.shape))
    words = ["teacher", "import", "weights.pt", "--architecture", f"own_nets:{name}", "--out", "target"]
    words += ["--num-classes", str(source.classes), "--image-shape", shape]
    words += ["--mean", ",".join(["0.5"] * source.shape[0]), "--std", ",".join(["0.25"] * source.shape[0])]
    words += ["--independent-labels"] if head == "sigmoid" else []
    by = "oracles:in_memory" if in_memory else "oracles:imported"
    return Case(words, frozenset(codes), writes=WRITES, by=by, about=source.parts)


def weights(rng: random.Random, space: dict[str, Any], source: user_code.Source) -> tuple[dict[str, Any], bool]:
    """The weights of a network that was trained, and whether there is something in them that no network has."""
    network = space["Outer"]()
    if source.is_lazy:
        with torch.no_grad():
            network.eval()(torch.zeros(2, *source.shape, dtype=space["DTYPE"]))
    randomise_statistics(network, rng.randrange(1000))
    state = network.state_dict()
    if rng.random() > 0.06:
        return state, False
    names = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()]
    name = rng.choice([name for name in names if name.endswith("running_var")] or names)
    name = rng.choice([name, rng.choice(names)])
    value = rng.choice([float("nan"), float("inf"), -1.0 if name.endswith("running_var") else float("-inf")])
    state[name].view(-1)[0] = value  # in the network, under all names of the tensor
    source.part(f"{value} in {name}")
    return state, True
