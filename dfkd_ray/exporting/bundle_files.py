"""A bundle as a format: for this package, with weights as they are or rounded to float16.

Rounded are all parameters, BatchNorm's scales and shifts too; its running statistics, which may span more than float16
holds, and other buffers stay as they are. Rounding is to the nearest of float16's values, ties to even. A value below
the smallest of them (2^-24) becomes that one with its sign, and not zero: so zeros, and the masks of a pruned network,
stay as they are. One above the largest (65504) is refused. The rounded tensors are in the file as float16, and loading
makes them float32 again. As float32 with 13 bits that are 0 they would take 3 to 4 % more, measured on four networks.

The file is packed (`bundles.packing`) if it has float16, or zeros in a weight; of a network whose every weight is a
value, plain float32, as `bundles.save` writes it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dfkd_ray import bundles, models
from dfkd_ray.bundles import DESCRIPTION, WEIGHTS, Teacher
from dfkd_ray.exporting.comparison import Run
from dfkd_ray.exporting.torch_files import runs
from dfkd_ray.text import one_line

NOTE = "float16"  # of teacher.json: the weights before, their accuracy, how many values were below the smallest
SMALLEST = 2.0**-24


def converted(teacher: Teacher) -> Teacher:
    """The teacher. `ValueError` if no bundle can build its network again."""
    if teacher.info.architecture == bundles.IN_MEMORY:
        raise ValueError(
            f"{teacher.name}: a network in memory has no bundle, which names an architecture and builds it; take "
            "another format, or make a bundle of its state dict with `dfkd-ray teacher import`"
        )
    return teacher


def rounded(teacher: Teacher) -> Teacher:
    """A copy whose parameters are float16 values (in their own dtype). Its accuracy is not known, unless none changed.

    `ValueError` names the first tensor with a value that float16 cannot hold.
    """
    network, info = models.adapting.copied(teacher.network), teacher.info
    has_changed, num_raised = False, 0
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point():
            continue
        own = parameter.detach().clone()
        low = nearest(own)
        if not low.isfinite().all():
            raise ValueError(
                f"{teacher.name}: {one_line(name, 80)} has a value of {float(own.abs().max()):.3g}, and float16 holds "
                "at most 65504; take float32"
            )
        parameter.detach().copy_(low)
        has_changed |= not torch.equal(parameter, own)
        num_raised += int(((own != 0) & (own.abs() <= SMALLEST / 2)).sum())
    note = {"weights_sha256": info.weights_sha256, "test_accuracy": info.test_accuracy, "num_raised": num_raised}
    if has_changed:
        info = info.model_copy(update={"notes": {**info.notes, NOTE: note}, "test_accuracy": None})
    elif NOTE not in info.notes:
        info = info.model_copy(update={"notes": {**info.notes, NOTE: note}})
    return replace(teacher, network=bundles.freeze(network), info=info)


def nearest(values: Tensor) -> Tensor:
    """The nearest float16 values, as float16; of what is not zero, the nearest that is not zero."""
    low = values.to(torch.float16)
    return torch.where((low == 0) & (values != 0), torch.sign(values).to(low.dtype) * SMALLEST, low)


def files(teacher: Teacher, _texts: Mapping[str, str]) -> dict[str, bytes]:
    """The two files of a bundle. What else there is to say of it is in its description."""
    state = dict(teacher.network.state_dict())
    names = [name for name, _ in teacher.network.named_parameters(remove_duplicate=False) if name in state]
    if NOTE in teacher.info.notes:  # of unknown origin: only what float16 holds exactly is stored so
        low = {name: state[name].to(torch.float16) for name in names if state[name].is_floating_point()}
        state |= {
            name: tensor for name, tensor in low.items() if torch.equal(tensor.to(state[name].dtype), state[name])
        }
    weights = [name for name in names if state[name].ndim > 1]
    is_packed = any(state[name].dtype == torch.float16 or bool((state[name] == 0).any()) for name in weights)
    stored = bundles.safetensors_bytes(bundles.to_stored(state, weights if is_packed else ()))
    info = teacher.info.model_copy(update={"weights_sha256": bundles.sha256(stored)})
    return {WEIGHTS: stored, DESCRIPTION: bundles.described(info)}


def open_bundle(path: Path) -> Run:
    """Runs a bundle that was written from a loaded one: code that it names was trusted then."""
    module = models.module_of(bundles.read_info(path).architecture)
    return runs(bundles.load(path, () if module is None else module).network)


def read(path: Path) -> dict[str, str]:
    """The fields of the description; values other than text are JSON."""
    found = bundles.read_info(path).model_dump(mode="json")
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
