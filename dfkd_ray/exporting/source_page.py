"""The file `model.py` around a network's code: what it is, how to normalise, how to load."""

import re
from collections.abc import Mapping
from typing import Any

from dfkd_ray.exporting.code_layout import Call, Code, call, laid_out, literal, sequence, text
from dfkd_ray.exporting.metadata import read
from dfkd_ray.exporting.source_code import Source, is_name

PAGE = '''"""A trained network: {name}.

Made by dfkd_ray {version}; it needs torch and safetensors alone. The weights are in weights.safetensors beside it.

    network = load()
    logits = network(normalised(pixels))  # pixels (batch, {sides}), float32 from {low} to {high}

BatchNorm and nn.Dropout are kept, so it can be trained further (`load().train()`); other parts that act in training
alone are not in it. {output}.
SHA-256 of the weights that it was made from: {sha256}
"""

from pathlib import Path

import torch
{functional}from safetensors.torch import load_file
from torch import nn

{constants}


class Group(nn.Module):
    """Layers, parameters and buffers by name."""

    def __init__(self, /, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def __getitem__(self, number):
        return getattr(self, str(number))


class Network(Group):
    """Normalised images (batch, {sides}) to logits (batch, {num_classes})."""

    def __init__(self):
{constructor}

    def forward(self, images):
{forward}


def normalised(pixels):
    """Pixels as the network takes them: (pixel - mean) / std per channel."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    shape = (-1,) + (1,) * (pixels.dim() - 2)
    return (pixels - mean.view(shape)) / std.view(shape)


def load(folder=Path(__file__).parent):
    """The network with its weights, in eval mode, on the CPU."""
    network = Network()
    network.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
    return network.eval()
'''


def page(source: Source, texts: Mapping[str, str]) -> str:
    """The content of `model.py`. Every text from a bundle is a literal in it, or has only letters, digits and `.-:`."""
    about = read(texts)
    constants = {"MEAN": about["mean"], "STD": about["std"], "CLASS_NAMES": about["class_names"]}
    forward = "\n".join(source.forward)
    return PAGE.format(
        name=re.sub(r"[^A-Za-z0-9.:_-]", "_", about["network"])[:80] or "network",
        version=about["package_version"],
        sides=", ".join(map(str, about["input_shape"])),
        low=f"{about['pixel_range'][0]:g}",
        high=f"{about['pixel_range'][1]:g}",
        output="Its classes exclude each other" if about["head"] == "softmax" else "Its labels are independent",
        sha256=about["weights_sha256"],
        num_classes=about["num_classes"],
        constants="\n".join(laid_out(f"{name} = ", of_values(values)) for name, values in constants.items()),
        constructor=laid_out("super().__init__", Call("(", parts_of(tree(source))), 8),
        forward=forward,
        functional="import torch.nn.functional as F\n" if re.search(r"\bF\.", forward) else "",
    )


def of_values(values: list[Any]) -> Code:
    """A tuple of numbers or texts."""
    return sequence([text(value) if isinstance(value, str) else literal(value) or "None" for value in values], True)


def tree(source: Source) -> dict[str, Any]:
    """Layers and tensors by the parts of their paths: nested mappings with code at their ends."""
    root: dict[str, Any] = {}
    for path, code in [*source.layers.items(), *source.tensors.items()]:
        *parents, name = path.split(".")
        inner = root
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = code
    return root


def parts_of(branch: Mapping[str, Any]) -> list[tuple[str, Code]]:
    """The arguments of a `Group`: by keyword where a name can be one."""
    parts: list[tuple[str, Code]] = []
    for name, value in branch.items():
        code = group(value) if isinstance(value, dict) else value
        parts.append((f"{name}=", code) if is_name(name) else ("**", Call("{", [(f"{text(name)}: ", code)], "}")))
    return parts


def group(branch: Mapping[str, Any]) -> Code:
    """A module that holds others: a list if they are numbered from 0."""
    numbered = set(branch) == {str(number) for number in range(len(branch))}
    if numbered and not any(is_tensor(value) for value in branch.values()):
        made = [
            group(value) if isinstance(value, dict) else value for _, value in sorted(branch.items(), key=by_number)
        ]
        return call("nn.ModuleList", [sequence(made, False)], {})
    return Call("Group(", parts_of(branch))


def is_tensor(value: Any) -> bool:
    """Whether code makes a parameter or a buffer, and no module."""
    return isinstance(value, Call) and value.head in ("nn.Parameter(", "torch.empty(")


def by_number(item: tuple[str, Any]) -> int:
    """The key that sorts numbered parts."""
    return int(item[0])
