"""Reads state dicts from weight files without running code and in bounded memory, and loads them into a network.

Formats: `.safetensors`, as a plain state dict or in a bundle's compressed forms (`from_stored`), and PyTorch's own
files. Their pickles are checked (`torch_files`) before `torch.load` opens them with `weights_only=True`.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import models, untrusted
from dfkd_ray.bundles import packing, torch_files
from dfkd_ray.compression import shape_edits
from dfkd_ray.description import BundleInfo
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import read_safetensors

PACKED = "::packed/2"  # a whole state dict in the form of `packing`
PACKINGS = ("::packed", PACKED)  # the first is what earlier versions wrote; they do not read the second
MASK, VALUES, SHAPE = "::mask", "::values", "::mask::shape"  # a pruned tensor as bundles had it before
LFS_POINTER = b"version https://git-lfs."
MAX_NESTING = 8  # of the keys that lead to a state dict
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_state_dicts(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a weight file: the keys that lead to one, joined by dots → name → tensor.

    A plain state dict has the key "". Whatever else the file holds is left out, without running code. `ValueError` for
    a missing file, a damaged one, one that names types other than tensors and plain data, or one without tensors.
    """
    where = one_line(path, 120)
    found = untrusted.plain_file(path)
    if found is None:
        raise ValueError(f"{where}: no such weights file")
    largest = untrusted.free_bytes() // 2
    untrusted.check_size(found.st_size, largest, str(path))
    if is_safetensors(path, where):
        return {"": from_stored(read_safetensors(path), str(path), largest)}
    data = torch_files.load(path, largest)
    states = state_dicts(data, where)
    if not states:
        kind = one_line(type(data).__name__, 60)
        raise ValueError(
            f"{where}: expected a state dict (name → tensor), got no named tensors ({kind}); {torch_files.ADVICE}"
        )
    return states


def is_safetensors(path: Path, where: str) -> bool:
    """The format of a weights file: by its first bytes, or by its ending if they do not tell.

    `ValueError` for what is found in the place of one: a pointer of Git LFS, an index of several files.
    """
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise ValueError(f"{where}: a pointer of Git LFS in the place of the file; fetch the file with `git lfs pull`")
    if path.name.lower().endswith(".index.json"):
        raise ValueError(f"{where}: an index of several files, expected one file; {torch_files.ADVICE}")
    if head[8:9] == b"{":
        return True
    plain = head.startswith((torch_files.ZIP_HEAD, torch_files.PICKLE_HEAD))
    return path.suffix.lower() == ".safetensors" and not plain


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The largest of `read_state_dicts`: for files of known origin. `ValueError` as there."""
    return max(read_state_dicts(path).values(), key=len)


def state_dicts(data: Any, where: str) -> dict[str, dict[str, Tensor]]:
    """The state dicts in nested mappings and sequences, as for `read_state_dicts`."""
    states: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()  # a pickle may hold one object any number of times

    def visit(value: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen or len(keys) > MAX_NESTING:
            return
        seen.add(id(value))
        items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        state = {name: item for name, item in items if isinstance(name, str) and plain_tensor(item)}
        if state:
            label = ".".join(keys)
            if label in states:
                raise ValueError(f"{where}: two parts of it are called {one_line(label, 80)!r}")
            states[label] = state
        for key, item in items:
            visit(item, (*keys, str(key)))

    visit(data, ())
    return states


def plain_tensor(value: Any) -> bool:
    """Whether a value is a tensor with a shape."""
    return isinstance(value, Tensor) and not value.is_nested


def from_stored(stored: Mapping[str, Tensor], where: str = "weights", largest: int | None = None) -> dict[str, Tensor]:
    """The inverse of `bundles.to_stored`; a plain state dict is returned as it is.

    Also reads the form that earlier versions wrote: a pruned tensor as its non-zero values, a bit for each weight and
    its shape. `ValueError` if the parts do not fit, if one of them is alone, or, before memory is allocated, if the
    dense tensors need more than `largest` bytes.
    """
    where = one_line(where, 120)
    largest = untrusted.free_bytes() // 2 if largest is None else largest
    name, packed = next(iter(stored.items()), ("", torch.zeros(0)))
    if len(stored) == 1 and name.startswith("::packed") and packed.dtype == torch.uint8 and packed.ndim == 1:
        if name not in PACKINGS:
            known = " and ".join(map(repr, PACKINGS))
            raise ValueError(f"{where}: weights compressed as {one_line(name, 60)!r}, this version reads {known}")
        return packing.unpack(packed.numpy().tobytes(), where, largest)
    masked = {key.removesuffix(MASK) for key in stored if key.endswith(MASK)}
    own = {name + ending for name in masked for ending in (MASK, VALUES, SHAPE)}
    for key in stored:
        if ("::" in key and key not in own) or key in masked:
            raise ValueError(f"{where}: {one_line(key, 80)} belongs to no mask, or to a tensor that is there twice")
    shapes = {name: stored_shape(stored, name, where) for name in masked}
    dense_bytes = sum(math.prod(shape) * stored[name + VALUES].element_size() for name, shape in shapes.items())
    untrusted.check_size(dense_bytes, largest, where)
    state = {}
    for key, tensor in stored.items():
        if key.endswith(MASK):
            name = key.removesuffix(MASK)
            values, shape = stored[name + VALUES], shapes[name]
            mask = torch.from_numpy(np.unpackbits(tensor.numpy()).astype(bool))
            num_values = int(mask.sum())
            if num_values != values.numel() or bool(mask[math.prod(shape) :].any()):
                raise ValueError(
                    f"{where}: {one_line(name, 80)} has {values.numel()} values, its mask wants {num_values}; damaged"
                )
            dense = torch.zeros(math.prod(shape), dtype=values.dtype)
            dense[mask[: len(dense)]] = values
            state[name] = dense.view(shape)
        elif "::" not in key:
            state[key] = tensor
    return state


def stored_shape(stored: Mapping[str, Tensor], name: str, where: str) -> list[int]:
    """The shape of a tensor stored as mask and values; `ValueError` if mask, shape and values do not fit together."""
    shown = one_line(name, 80)
    mask, shape, values = (stored.get(name + ending) for ending in (MASK, SHAPE, VALUES))
    if mask is None or shape is None or values is None:
        raise ValueError(f"{where}: {shown} has a mask but no shape or no values; the file is damaged")
    if mask.dtype != torch.uint8 or mask.ndim != 1 or values.ndim != 1:
        raise ValueError(f"{where}: {shown} has a mask or values that are not one-dimensional; the file is damaged")
    if shape.dtype not in (torch.int32, torch.int64) or shape.ndim != 1 or len(shape) > untrusted.MAX_DIMENSIONS:
        raise ValueError(f"{where}: the shape of {shown} is not a list of integers; the file is damaged")
    sides = shape.tolist()
    if any(side < 0 for side in sides) or (math.prod(sides) + 7) // 8 != len(mask):
        raise ValueError(
            f"{where}: {shown} has a mask of {len(mask)} bytes, which its shape {one_line(sides, 60)} does not fit"
        )
    if math.prod(max(1, side) for side in sides) >= 2**60:
        raise ValueError(f"{where}: {shown} has no possible shape: {one_line(sides, 60)}")
    return sides


def filled(info: BundleInfo, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """A bundle's network with the weights of `state`; `where` is their place, for messages.

    The names are those of the network's own code, or those after it has been adapted (computed weights are plain then).
    """
    of = {"num_classes": info.num_classes, "image_shape": info.input_shape}
    network = models.build(info.architecture, info.arguments, finished=False, **of)
    is_own = set(state) == set(network.state_dict())
    if is_own:
        load_state(shape_edits.replay(network, info.shape_edits), state, where)
    models.finish(network, info.architecture, **of)
    if not is_own:
        load_state(shape_edits.replay(network, info.shape_edits), state, where)
    if info.shape_edits:
        models.check_output(network, info.architecture, info.num_classes, info.image_shape)
    check_head(network, info.head)
    return network


def check_head(network: nn.Module, head: str) -> None:
    """`ValueError` if a network ends in another function than the head of its description."""
    ends_in = models.adapting.ends_in(network)
    if ends_in is not None and ends_in != head:
        meaning = {"sigmoid": "independent labels", "softmax": "classes that exclude each other"}[ends_in]
        raise ValueError(f"the network ends in a {ends_in}, so it has {meaning}: `head` is {head}, expected {ends_in}")


def load_state(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict; `ValueError` names the first mismatch and counts the others.

    Floating-point dtypes of 16, 32 and 64 bits are converted into each other, and so are integer dtypes. Other
    combinations, sparse and quantised tensors, and values that the network's dtype cannot hold are refused.
    """
    where = one_line(where, 120)
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{one_line(name, 80)} is not of this architecture" for name in state if name not in expected]
    problems += shape_problems(expected, state)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{where}: does not fit the architecture or class count: {one_line(problems[0], 200 - len(more))}{more}"
        )
    converted = {}
    for name, tensor in expected.items():
        problem = kind_problem(state[name], tensor)
        if problem is None:
            converted[name] = state[name].to(tensor.dtype)
            problem = value_problem(name, converted[name], state[name])
        if problem:
            raise ValueError(f"{where}: {one_line(name, 80)} {problem}")
    # Some modules read the version of their names (torchvision's MNASNet): that of today, which has been checked.
    versions = OrderedDict(converted)
    versions._metadata = getattr(expected, "_metadata", {})  # type: ignore[attr-defined]
    try:
        network.load_state_dict(versions)
    except Exception as error:  # noqa: BLE001 - the user's network may override loading
        raise ValueError(f"{where}: the network does not take the weights: {untrusted.reason(error)}") from None


def shape_problems(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a state dict whose shapes are not those of the network's own."""
    return [
        f"{name} is {'x'.join(map(str, state[name].shape))}, expected {'x'.join(map(str, tensor.shape))}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]


def kind_problem(given: Tensor, own: Tensor) -> str | None:
    """Why a tensor's type does not fit the network's own tensor, or None."""
    if given.layout != torch.strided or given.is_quantized or given.is_nested:
        kind = "quantised" if given.is_quantized else "sparse" if given.layout != torch.strided else "nested"
        return f"is {kind}, expected plain {kind_of(own.dtype)} values"
    if given.is_meta:
        return "has a shape and no values (it was saved from the meta device)"
    same = any(given.dtype in kinds and own.dtype in kinds for kinds in (FLOATS, INTEGERS, (own.dtype,)))
    return None if same else f"holds {kind_of(given.dtype)}, the network's own {kind_of(own.dtype)}"


def value_problem(name: str, converted: Tensor, given: Tensor) -> str | None:
    """Why the values cannot be loaded after conversion to the network's dtype, or None."""
    if converted.dtype in INTEGERS:
        same = converted.dtype == given.dtype or torch.equal(converted.to(given.dtype), given)
        return None if same else f"has values that {kind_of(converted.dtype)} cannot hold"
    if converted.dtype.is_complex or converted.is_floating_point():
        if not given.isfinite().all():
            return "has values that are not finite"
        if not converted.isfinite().all():
            return f"has values beyond what {kind_of(converted.dtype)} holds (its own kind is {kind_of(given.dtype)})"
    if name.rpartition(".")[2] == "running_var" and not converted.is_complex() and bool((converted < 0).any()):
        return "has negative values; a variance is 0 or more"
    return None


def check_values(network: nn.Module, where: str) -> None:
    """`ValueError` names the first weight or statistic of a network that no trained network has.

    Other buffers may hold anything (masks of transformers hold -inf).
    """
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, tensor in network.state_dict().items():
        problem = value_problem(name, tensor, tensor)
        if problem and (name in parameters or name.endswith(("running_mean", "running_var"))):
            raise ValueError(f"{where}: {one_line(name, 80)} {problem}")


def kind_of(dtype: torch.dtype) -> str:
    """The usual name of a dtype."""
    return str(dtype).removeprefix("torch.")
