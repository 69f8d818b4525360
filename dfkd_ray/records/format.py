"""Reads and writes an activation record: the file `records/<kind>.safetensors` in a teacher's bundle.

The header is JSON under the metadata key `dfkd_ray.record`; its schema is `record.schema.json` beside this module. The
full specification is in README.md beside this module, section "The format". A file holds these tensors and no others:

* Storage `gaussian`, for each part: `<part>.mean` (C, d), float32, and `<part>.factor` (C, d, r), float16 or float32.
  Class c has the distribution N(mean_c, factor_c factor_c^T), computed in float32. Kind `all` has one part per layer,
  kind `top` has the last layer's part. Such a part has the layer's name and covers its outputs; the last layer's
  outputs are logits / temperature. A spectral kind has one part, `coefficients`, over the columns of all its bases
  (d = K).
* Storage `exemplars` (spectral kinds only; no parts): `labels` (n,) int64, `indices` (n, k) int32 and `values` (n, k)
  float16. They are the k coefficients of largest magnitude of each of n training examples. `indices` counts the columns
  of all bases from 0, in the order of the bases.
* Spectral kinds, with either storage: `basis.<i>` (units, columns) float16 with orthonormal columns, one basis per
  signal, in the header's order. `spectral` has one signal: the activations of all layers, concatenated.
  `spectral_pairs` has the first layer's activation, then the input and the activation of each further layer.

Sizes: C classes, d units of a part, r columns of a factor, K columns of all bases, n exemplars, k coefficients each.
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
    """The header's entries for these taps."""
    return tuple(LayerInfo(name=tap.name, in_shape=tap.in_shape, out_shape=tap.out_shape) for tap in found)


def encode(record: Record) -> bytes:
    """The bytes of the file."""
    metadata = {METADATA: record.info.model_dump_json()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.tensors.items()}
    return safetensors.torch.save(tensors, metadata=metadata)


def decode(
    data: bytes, where: str, teacher_hash: str, layers: tuple[LayerInfo, ...], kind: str | None = None
) -> Record:
    """The inverse of `encode`, for a record of the teacher with this hash; `where` names the file in error messages.

    `ValueError` if the record is damaged, belongs to another teacher, is not of `kind` (when given), or is
    inconsistent.
    """
    where = one_line(where, 120)
    # safetensors returns metadata only for a file that it opens by path.
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
    """The record, with its bases as float32. `ValueError` if its layers are not the teacher's, a tensor is missing,
    unknown or not of the shape in the header, or its parts contradict each other (`consistency`).
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
    """Tensor name → shape. The header gives the shapes; for exemplars, n and k come from `labels` and `indices`."""
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
    """The teacher hash in a record's header; None if the file is not a record."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]) if size < len(data) else {}
        found = json.loads(header["__metadata__"][METADATA])["teacher_hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def json_schema() -> dict[str, Any]:
    """The JSON schema of the header: the contents of `record.schema.json`."""
    return RecordInfo.model_json_schema()


def to_arrays(record: Record) -> dict[str, Any]:
    """The record as plain data and numpy arrays, to send it to other processes."""
    arrays = {name: tensor.numpy() for name, tensor in record.tensors.items()}
    return {"info": record.info.model_dump(mode="json"), "tensors": arrays, "sha256": record.sha256}


def from_arrays(data: Mapping[str, Any]) -> Record:
    """The inverse of `to_arrays`."""
    info = untrusted.validated(RecordInfo, data["info"], "record")
    tensors = {name: torch.tensor(array) for name, array in data["tensors"].items()}
    return checked(Record(info, tensors, data["sha256"]), "record", info.layers)
