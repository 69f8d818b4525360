"""Checkpoint files: networks, optimiser momentum and plain counters in one safetensors file.

A checkpoint is compared with the network in training before any of it is loaded. One that is damaged, or of another
network or version, raises `ValueError`; the callers log it and start the training again.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import untrusted
from dfkd_ray.bundles import content, safetensors_bytes
from dfkd_ray.storage import Folder
from dfkd_ray.text import one_line

FILE = "state.safetensors"
STATE = "state"  # metadata key of the counters
COUNT = "num_tensors"  # a counter: the number of tensors that were written
MAX_NETWORKS = 8  # largest ratio of a file's bytes to the network's bytes, with a margin


def write(
    folder: Folder, tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, plain: dict[str, Any]
) -> None:
    """Write tensors by name, the optimiser's momentum and plain counters, atomically."""
    named = dict(tensors)
    for index, parameter in enumerate(parameters(optimiser)):
        momentum = optimiser.state[parameter].get("momentum_buffer")
        if momentum is not None:
            named[f"momentum.{index}"] = momentum
    write_file(folder, FILE, named, plain)


def write_file(folder: Folder, name: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Write tensors by name, and plain data in the file's header, atomically."""
    folder.write(name, safetensors_bytes(tensors, {STATE: json.dumps({**plain, COUNT: len(tensors)})}))


def read(folder: Folder, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The counters and tensors of a checkpoint of this network; None if there is none.

    `ValueError` if it is damaged or too large for this network.
    """
    own = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return read_file(folder, FILE, MAX_NETWORKS * own + untrusted.SPARE_BYTES)


def read_file(folder: Folder, name: str, most: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Plain data and tensors of a file written by `write_file`; None if there is none.

    `ValueError` if it is damaged or larger than `most` bytes.
    """
    data = content(folder, name, most)
    if data is None:
        return None
    where = str(folder / name)
    metadata = untrusted.safetensors_header(data, where, "checkpoint").get("__metadata__")
    text = metadata.get(STATE) if isinstance(metadata, dict) else None
    plain = untrusted.parse_json(text.encode(), f"{where}: its counters") if isinstance(text, str) else None
    if not isinstance(plain, dict):
        raise ValueError("it has no counters")
    tensors = untrusted.read_safetensors(data, where, "checkpoint")
    if plain.pop(COUNT, None) != len(tensors):
        raise ValueError("it has other tensors than it was written with")
    return plain, tensors


def part(tensors: Mapping[str, Tensor], prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a prefix; `ValueError` unless names, shapes, dtypes are those of `like`, and values finite."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if set(found) != set(like):
        other = min(set(found) ^ set(like))
        raise ValueError(f"{prefix}{one_line(other, 60)} is missing, or is not of this network")
    for name, tensor in found.items():
        check_like(f"{prefix}{name}", tensor, like[name])
    return found


def momenta(tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Parameter number → momentum; `ValueError` if one belongs to no parameter or has another shape."""
    own = parameters(optimiser)
    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("momentum."):
            number = name.removeprefix("momentum.")
            if not number.isascii() or not number.isdigit() or len(number) > 9 or int(number) >= len(own):
                raise ValueError(f"{one_line(name, 60)} belongs to no parameter")
            check_like(name, tensor, own[int(number)])
            found[int(number)] = tensor
    return found


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """`ValueError` unless a tensor has the shape and dtype of `like`, and finite values."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{one_line(name, 60)} has another shape or dtype than the network's")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{one_line(name, 60)} has values that are not finite")


def put_momenta(found: Mapping[int, Tensor], optimiser: torch.optim.Optimizer) -> None:
    """Load the momentum into the optimiser."""
    own = parameters(optimiser)
    for index, tensor in found.items():
        optimiser.state[own[index]]["momentum_buffer"] = tensor.to(own[index].device)


def counter(plain: Mapping[str, Any], name: str, most: int) -> int:
    """A counter from 0 to `most`; `ValueError` for anything else."""
    value = plain.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {one_line(repr(value), 40)}, expected 0 to {most}")
    return value


def parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the optimiser's order."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
