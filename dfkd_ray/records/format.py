"""The file of a record: `records/<kind>.safetensors` in a teacher's bundle, readable and writable by any tool.

The header is JSON under the metadata key `dfkd_ray.record` (its schema: `record.schema.json` beside this module); the
tensors are named below. The whole specification: README.md beside this module, "The format".
Sizes: C classes, d units of a part, r columns of a factor, K columns of all bases, n exemplars of k coefficients.

* `gaussian`: `<part>.mean` (C, d) and `<part>.factor` (C, d, r), float32: class c is N(mean_c, factor_c factor_c^T).
  `all` has a part per layer, over its outputs (the last one's are logits / temperature); `top` has the last layer's;
  the spectral kinds have one part, `coefficients`, over all bases jointly (d = K).
* `exemplars` (spectral kinds, no parts): `labels` (n,) int64, `indices` (n, k) int32 and `values` (n, k) float16: the k
  strongest coefficients of n training examples. `indices` number the columns through, from one basis to the next.
* `basis.<i>` (units, columns) float16 (spectral kinds): orthonormal columns, a basis per signal, in the header's order.
  `spectral`: one signal, the activations of all layers. `spectral_pairs`: the first layer's activation, then of each
  other layer its input and its activation.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dfkd_ray import untrusted
from dfkd_ray.records import consistency
from dfkd_ray.records.header import KINDS as KINDS
from dfkd_ray.records.header import SCHEMA, LayerInfo, RecordInfo
from dfkd_ray.records.header import SPECTRAL as SPECTRAL
from dfkd_ray.records.header import STORAGES as STORAGES
from dfkd_ray.records.header import BasisInfo as BasisInfo
from dfkd_ray.records.header import PartInfo as PartInfo
from dfkd_ray.records.taps import Tap
from dfkd_ray.text import one_line

METADATA = "dfkd_ray.record"


@dataclass(frozen=True)
class Record:
    """A record in memory; `sha256` is of its file."""

    info: RecordInfo
    tensors: Mapping[str, Tensor]
    sha256: str = ""
    bases: tuple[Tensor, ...] = field(default=(), compare=False)  # float32, filled in by `checked`


def layer_infos(found: Sequence[Tap]) -> tuple[LayerInfo, ...]:
    """Taps as a record names them."""
    return tuple(LayerInfo(name=tap.name, in_shape=tap.in_shape, out_shape=tap.out_shape) for tap in found)


def encode(record: Record) -> bytes:
    """The bytes of the file."""
    metadata = {METADATA: record.info.model_dump_json()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.tensors.items()}
    return safetensors.torch.save(tensors, metadata=metadata)


def decode(
    data: bytes, where: str, teacher_hash: str, layers: tuple[LayerInfo, ...], kind: str | None = None
) -> Record:
    """The inverse of `encode`, for a record of this very teacher; `where` says in errors which file it is.

    `ValueError` for one that is damaged, of another teacher, of another kind than `kind` where that is given, or whose
    parts do not belong together.
    """
    where = one_line(where, 120)
    # The library tells of metadata only where it opens the file itself.
    metadata = untrusted.safetensors_header(data, where, "record").get("__metadata__")
    text = metadata.get(METADATA) if isinstance(metadata, dict) else None
    header = untrusted.parse_json(text.encode(), f"{where}: its header") if isinstance(text, str) else None
    if not isinstance(header, dict) or header.get("schema_version") != SCHEMA:
        found = header.get("schema_version") if isinstance(header, dict) else None
        raise ValueError(f"{where}: schema_version is {one_line(repr(found), 60)}, this version reads {SCHEMA!r}")
    info = untrusted.validated(RecordInfo, header, where)
    if info.teacher_hash != teacher_hash:
        raise ValueError(
            f"{where}: recorded on teacher {one_line(info.teacher_hash[:12], 60)}…, this one is {teacher_hash[:12]}…; "
            "use the record that was released with it"
        )
    if kind is not None and info.kind != kind:
        raise ValueError(f"{where}: a record of kind {info.kind} under the name of a {kind} record")
    tensors = untrusted.read_safetensors(data, where, "record")
    return checked(Record(info, tensors, hashlib.sha256(data).hexdigest()), where, layers)


def checked(record: Record, where: str, layers: tuple[LayerInfo, ...]) -> Record:
    """The record, when its layers are the teacher's, its parts belong together (`consistency`) and every tensor has the
    shape that the header says. `ValueError` says what is not so.
    """
    info = record.info
    if info.layers != layers:
        named, own = (one_line(", ".join(layer.name for layer in some), 60) for some in (info.layers, layers))
        raise ValueError(f"{where}: its layers are {named}, the teacher's {own}, or of other shapes")
    problem = consistency.problem_of_header(info)
    if problem:
        raise ValueError(f"{where}: {problem}")
    expected = expected_shapes(info, record.tensors)
    for name, shape in expected.items():
        found = record.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            given = "missing" if found is None else "x".join(map(str, found.shape))
            raise ValueError(f"{where}: {one_line(name, 60)} is {given}, expected {'x'.join(map(str, shape))}")
    unknown = sorted(set(record.tensors) - set(expected))
    if unknown:
        raise ValueError(f"{where}: {one_line(unknown[0], 60)} is no tensor of a {info.kind} record ({info.storage})")
    problem = consistency.problem_of_tensors(info, record.tensors)
    if problem:
        raise ValueError(f"{where}: {problem}")
    bases = tuple(record.tensors[f"basis.{i}"].float() for i in range(len(info.bases)))
    return Record(info, record.tensors, record.sha256, bases)


def expected_shapes(info: RecordInfo, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, as the header says."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in info.parts:
        shapes[f"{part.name}.mean"] = (info.num_classes, part.units)
        shapes[f"{part.name}.factor"] = (info.num_classes, part.units, part.rank)
    for index, basis in enumerate(info.bases):
        shapes[f"basis.{index}"] = (basis.units, basis.columns)
    if info.storage == "exemplars":
        labels, indices = tensors.get("labels"), tensors.get("indices")
        n = 0 if labels is None or labels.ndim != 1 else len(labels)
        k = 0 if indices is None or indices.ndim != 2 else indices.shape[1]
        shapes |= {"labels": (n,), "indices": (n, k), "values": (n, k)}
    return shapes


def teacher_hash_of(data: bytes) -> str | None:
    """The teacher that a file says it is a record of; None where it is no record."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]) if size < len(data) else {}
        found = json.loads(header["__metadata__"][METADATA])["teacher_hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def json_schema() -> dict[str, Any]:
    """The schema of the header, as it lies beside this module."""
    return RecordInfo.model_json_schema()


def to_arrays(record: Record) -> dict[str, Any]:
    """Plain data and numpy arrays, for other processes."""
    arrays = {name: tensor.numpy() for name, tensor in record.tensors.items()}
    return {"info": record.info.model_dump(mode="json"), "tensors": arrays, "sha256": record.sha256}


def from_arrays(data: Mapping[str, Any]) -> Record:
    """The inverse of `to_arrays`."""
    info = untrusted.validated(RecordInfo, data["info"], "record")
    tensors = {name: torch.tensor(array) for name, array in data["tensors"].items()}
    return checked(Record(info, tensors, data["sha256"]), "record", info.layers)
