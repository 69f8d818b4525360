"""A teacher: a frozen network and its description, from a bundle, a library, memory or another process."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from dfkd_ray import models, untrusted
from dfkd_ray.bundles import pretrained
from dfkd_ray.bundles.folders import (
    ENDING,
    RECORDS,
    WEIGHTS,
    content,
    explained,
    locate,
    read_info,
    read_weights,
    safetensors_bytes,
    sha256,
    teacher_hash,
    to_stored,
)
from dfkd_ray.bundles.in_memory import Description, completed
from dfkd_ray.bundles.weights import check_head, check_values, filled
from dfkd_ray.description import BundleInfo
from dfkd_ray.models import attributes
from dfkd_ray.records import format, taps
from dfkd_ray.records.format import Record
from dfkd_ray.storage import Folder, Where
from dfkd_ray.text import one_line

IN_MEMORY = "in memory"  # the architecture of a teacher that no bundle holds


@dataclass(frozen=True)
class Teacher:
    """A loaded network in eval mode with frozen parameters, and the description from its bundle.

    `records` holds the activation records read so far, by kind; `folder` is the bundle, None for a network in memory.
    """

    network: nn.Module
    info: BundleInfo
    hash: str
    name: str
    folder: Folder | None = None
    records: dict[str, Record] = field(default_factory=dict, compare=False)

    @classmethod
    def from_network(cls, network: nn.Module, **description: Unpack[Description]) -> "Teacher":
        """A teacher from a network in memory: a frozen copy in eval mode on the CPU; the network is not modified.

        The hash covers the network's structure, all its weights, and the plain attributes of its modules, by which a
        `forward` may go.
        `ValueError` for an invalid or missing description, or if the network's output is not (batch, num_classes)
        logits.
        """
        given = completed(dict(description))
        network = models.adapting.unwrapped(network)
        own = freeze(models.adapting.copied(network))
        models.checks.check_state(own, IN_MEMORY)
        own.cpu()
        kind = type(network)
        text = f"{kind.__module__}.{kind.__qualname__}\n{own!r}\n{attributes.text_of(own)}"
        structure = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
        arguments = {"network": kind.__qualname__, "structure_sha256": structure}
        name = given.pop("name")
        info = untrusted.validated(BundleInfo, {"architecture": IN_MEMORY, "arguments": arguments, **given}, name)
        freeze(models.finish(own, IN_MEMORY, info.num_classes, info.input_shape))
        check_head(own, info.head)
        check_values(own, name)
        info = info.model_copy(update={"weights_sha256": sha256(safetensors_bytes(own.state_dict()))})
        return cls(own, info, teacher_hash(info), name)

    def record_kinds(self) -> list[str]:
        """The kinds of the records in the bundle and of those in memory."""
        found: list[str] = []
        if self.folder is not None:
            with explained(self.folder):
                found = (self.folder / RECORDS).names()
        return sorted({*self.records, *(kind for kind in format.KINDS if f"{kind}{ENDING}" in found)})

    def record(self, kind: str) -> Record:
        """The record of a kind. `ValueError` if it is missing, damaged or of another teacher."""
        if kind not in format.KINDS:
            raise ValueError(f"a record of kind {one_line(kind, 60)!r}: expected {', '.join(format.KINDS)}")
        if kind not in self.records:
            data, where = None, ""
            if self.folder is not None:
                place, name = self.folder / RECORDS, f"{kind}{ENDING}"
                where = str(place / name)
                with explained(self.folder):
                    data = content(place, name, untrusted.free_bytes() // 2)
            if data is None and self.folder is None and pretrained.is_named(self.name):
                raise ValueError(
                    f"{self.name}: a library's network has no folder for a {kind} record; make a bundle of it first "
                    "(`dfkd-ray teacher import` takes this name in the place of a file)"
                )
            if data is None:
                raise ValueError(
                    f"{self.name}: no {kind} record in its bundle (expected records/{kind}.safetensors); where the "
                    f"training data is, `dfkd-ray teacher record` makes one of kind {kind}"
                )
            layers = format.layer_infos(taps.find(self.network, self.info.image_shape))
            self.records[kind] = format.decode(data, where, self.hash, layers, kind)
        return self.records[kind]


def load(name: Where, trust_code: Sequence[str] | str = (), *, download: bool = False) -> Teacher:
    """Load a teacher onto the CPU: a bundle, as folder, URI or name of a bundled one, or a library's network by name.

    `download`: fetch a library's weights if they are not on this machine (see `pretrained`). `ValueError` if the
    weights are missing, truncated, or of another hash or shape, or if the architecture is an import path and
    `trust_code` names neither its module nor a package above it. `OSError` if a URI cannot be read.
    """
    if pretrained.is_named(name):
        network, info = pretrained.load(str(name), download=download)
        weights = safetensors_bytes(to_stored(network.state_dict(), ()))  # as `save` would write them
        info = info.model_copy(update={"weights_sha256": sha256(weights)})
        return Teacher(freeze(network), info, teacher_hash(info), pretrained.parse(str(name)).name)
    folder = locate(name)
    info = read_info(folder)
    module = models.untrusted_module(info.architecture, [trust_code] if isinstance(trust_code, str) else trust_code)
    if module is not None:
        raise ValueError(
            f"{folder}: its architecture is code, {info.architecture!r}; if you trust that module, "
            f"add `trust_code={module}`"
        )
    network = filled(info, read_weights(folder, info), str(folder / WEIGHTS))
    return Teacher(freeze(network), info, teacher_hash(info), folder.name, folder)


def to_arrays(teacher: Teacher) -> dict[str, Any]:
    """A teacher as plain data and numpy arrays, to send it to other processes; Ray shares arrays on a node."""
    state = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in teacher.network.state_dict().items()}
    plain = {"info": teacher.info.model_dump(mode="json"), "hash": teacher.hash, "name": teacher.name, "state": state}
    plain |= {"code": models.code_folder() if models.module_of(teacher.info.architecture) else None}
    return plain | {"records": {kind: format.to_arrays(record) for kind, record in teacher.records.items()}}


def from_arrays(data: Mapping[str, Any]) -> Teacher:
    """The inverse of `to_arrays`; copies the arrays. Imports the architecture's code: `load` has checked the trust."""
    info = untrusted.validated(BundleInfo, data["info"], data["name"])
    with models.code_from(data.get("code")):
        network = filled(
            info, {k: torch.from_numpy(np.array(array)) for k, array in data["state"].items()}, data["name"]
        )
    records = {kind: format.from_arrays(record) for kind, record in data.get("records", {}).items()}
    return Teacher(freeze(network), info, data["hash"], data["name"], records=records)


def freeze(network: nn.Module) -> nn.Module:
    """Eval mode, no gradient for any parameter."""
    return network.eval().requires_grad_(False)
