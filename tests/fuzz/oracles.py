"""What must hold of a network that was taken, looked at in the forked process that took it.

It runs there in the place of the command line (`Case.by`): first the command, and if that ends well, what it wrote is
compared with the user's own network. A difference is an `AssertionError`, whose traceback the bench finds.
"""

import importlib
import json
import math
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dfkd_ray
from dfkd_ray import bundles, cli
from dfkd_ray.models import adapting, checks

TOLD = "told.json"  # what the generator knows of its network
TOLERANCE = 1e-4  # of logits, relative to the largest
FAILED = "the recovery has failed: "


def imported() -> None:
    """`teacher import` of code of the user's, and for some networks `recover`."""
    told = json.loads(Path(TOLD).read_text())
    ended_well(sys.argv[1:])
    said = printed()
    teacher = bundles.load("target", trust_code=["own_nets"])
    own = users_network(told)
    check_answers(teacher, own, told, said)
    second = bundles.load("target", trust_code=["own_nets"]).network
    for parameter in second.parameters():
        parameter.zero_()
    assert not told["differs"] or any(p.any() for p in teacher.network.parameters()), "two networks, one memory"
    if told["recover"]:
        ended_well(told["recover"])
        student = bundles.load("done/student", trust_code=["own_nets"]).network
        check_student(student, json.loads(Path("done/row.json").read_text()), told)


def in_memory() -> None:
    """The same of a network in memory, which stays as it was."""
    told = json.loads(Path(TOLD).read_text())
    own = users_network(told, keep_kind=True).train(told["training"])
    before, modes = copied_state(own), [module.training for module in own.modules()]
    flags = [parameter.requires_grad for parameter in own.parameters()]
    try:
        teacher = bundles.Teacher.from_network(own, **told["described"])
        notes = "\n".join(adapting.notes(teacher.network))
        check_answers(teacher, users_network(told), told, notes + "not finite")
        if told["recover"]:
            done = dfkd_ray.recover(
                own, sparsity=told["sparsity"], settings=told["settings"], progress=False, **told["described"]
            )
            check_student(done.student, done.row, told)
    except (Exception, SystemExit) as error:  # the user's own forward may raise anything, or leave
        if isinstance(error, ValueError):
            refused(str(error), 2)
        if not (str(error).startswith(FAILED) or checks.raised_by_network(error)):
            raise
        refused(" ".join(str(error).split()), 1)
    assert [module.training for module in own.modules()] == modes, "the mode of the user's network has changed"
    assert [parameter.requires_grad for parameter in own.parameters()] == flags, "its flags have changed"
    if told["steady"]:
        after = own.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert list(before) == list(after) and not changed, f"the user's network has changed: {changed}"


def checkpoint() -> None:
    """`teacher import` of a checkpoint: the weights are those of the set that the message names."""
    told = json.loads(Path(TOLD).read_text())
    ended_well(sys.argv[1:])
    said = printed()
    loaded = bundles.load("target").network.state_dict()
    sets = torch.load("sets.pt", weights_only=True)  # place -> state dict under the network's names
    taken = [place for place, state in sets.items() if equal(loaded, state)]
    assert set(taken) & set(told["wanted"]), f"the weights are those at {taken}, not at {told['wanted']}"
    named = [place for place in taken if names(said, *told["places"][place])]
    assert named, f"the weights are those at {taken}; said was: {said!r}"
    for other in told["unsaid"]:
        assert other in taken or other in said, f"{other!r} fits too, and is not named: {said!r}"


def printed() -> str:
    """What the command has printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    return Path("../out").read_text() + Path("../err").read_text()


def names(said: str, key: str, prefix: str) -> bool:
    """Whether a message names this key and prefix, and no other."""
    parts = {"those at ": key, "without the prefix ": repr(prefix) if prefix else ""}
    return all(f"{words}{value}" in said if value else words not in said for words, value in parts.items())


def equal(loaded: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts agree, once the second is of the first's types."""
    return all(
        torch.equal(tensor, state[name].to(tensor.dtype) if name in state else torch.zeros_like(tensor))
        for name, tensor in loaded.items()
    )


def ended_well(words: list[str]) -> None:
    """Run a command line in this process; leave with its exit code if that is not 0."""
    sys.argv = ["dfkd-ray", *words]
    try:
        cli.main()
    except SystemExit as left:
        if left.code:
            raise
    sys.stdout.flush()


def refused(message: str, code: int) -> None:
    """End as the command line would with this error."""
    assert "\n" not in message, f"more than a line: {message!r}"
    sys.stderr.write(f"error: {message[:200]}\n")
    sys.exit(code)


def users_network(told: Mapping[str, Any], keep_kind: bool = False) -> Any:
    """The user's own network in eval mode with the weights, loaded as the user does; half precision computes as float32
    unless `keep_kind`."""
    sys.path.append(".")
    own = importlib.import_module("own_nets")
    network = own.Outer()
    network.load_state_dict(torch.load("weights.pt"))
    network.eval()
    return network.float() if own.DTYPE.itemsize == 2 and not keep_kind else network


def copied_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a state dict."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def check_answers(teacher: bundles.Teacher, network: nn.Module, told: Mapping[str, Any], said: str) -> None:
    """The teacher answers as the user's network does, in eval mode and in train mode."""
    own = importlib.import_module("own_nets")
    shape = teacher.info.image_shape
    images = torch.randn(5, *own.SHAPE, generator=torch.Generator().manual_seed(7))
    kind = own.DTYPE if own.DTYPE.itemsize == 8 else torch.float32
    for mode in ("eval", "train") if told["compare_train"] else ("eval",):
        training = mode == "train"
        twin = deepcopy(teacher.network).train(training)
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                expected = own.logits(network.train(training)(images.to(kind)), training).double()
                torch.manual_seed(0)
                given = twin(images.reshape(len(images), *shape)).double()
        except (Exception, SystemExit) as error:
            if told["open"] and checks.raised_by_network(error):  # its own forward fails now and then
                return
            raise
        assert given.shape == (5, own.CLASSES), (mode, given.shape)
        final = own.FINAL[mode]
        if not expected.isfinite().all():
            assert "not finite" in said, f"{mode}: not finite, and not said: {said!r}"
            continue
        if final:
            assert f"ends in a {final}" in said, f"{final} in {mode} mode, and not said: {said!r}"
            given = given.softmax(1) if final == "softmax" else given.sigmoid()
        elif own.FINAL["eval"] == "softmax":
            given, expected = given.log_softmax(1), expected.log_softmax(1)
        scale = float(expected.abs().max())
        change = float((given - expected).abs().max())
        assert change <= TOLERANCE * scale + 1e-5, f"{mode}: other answers, by {change:.3g} of {scale:.3g}"


def check_student(student: nn.Module, row: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """A row that says `finished` is so: the sparsity asked for, and no number that is none."""
    assert row["status"] == "finished", row["status"]
    wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    assert not wrong, f"not finite: {wrong}"
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    weights = {id(m.weight): m.weight for m in student.modules() if isinstance(m, kinds)}.values()
    total = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    asked = told["sparsity"] * total
    assert zeros >= asked - 1, f"{zeros} zeros of {total}, asked for {asked:.1f}"
    assert abs(row["achieved_sparsity"] * total - zeros) < 0.01 * total, (row["achieved_sparsity"], zeros, total)
    shape = row["image_shape"] if "image_shape" in row else told["image_shape"]
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        assert student.eval()(images).isfinite().all(), "the student's answers are not finite"
