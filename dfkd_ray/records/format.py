"""The file of a record: `records/<kind>.safetensors` in a teacher's bundle, readable and writable by any tool.

The header is JSON under the metadata key `dfkd_ray.record` (its schema: `record.schema.json` beside this module); the
tensors are named by the parts below it. Sizes: C classes, d units of a part, r columns of a factor, K coefficients.

* `gaussian`: per part `<part>.mean` (C, d) and `<part>.factor` (C, d, r), float32: class c is N(mean_c, factor_c
  factor_c^T). `top` and `all` have a part per layer over its outputs (the last layer's are logits / temperature); the
  spectral kinds have one part, `coefficients`, over all bases jointly (d = K).
* `exemplars` (spectral kinds): `labels` (n,) int64, `indices` (n, k) int32 and `values` (n, k) float16: the k
  strongest coefficients of n training examples.
* `exemplars` (spectral kinds): `labels` (n,) int64, `indices` (n, k) int32, `values` (n, k) float16: the k
  the other. `spectral`: one signal, the activations of all layers. `spectral_pairs`: for each layer but the first
  its input, and for each its activation.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dfkd_ray.config import STRICT, RecordKind, validate
from dfkd_ray.records.taps import Tap

SCHEMA = "dfkd_ray.record/1"
METADATA = "dfkd_ray.record"
KINDS: tuple[RecordKind, ...] = get_args(RecordKind)
SPECTRAL = ("spectral", "spectral_pairs")
STORAGES = ("gaussian", "exemplars")


class LayerInfo(BaseModel):
    """A layer whose values the record is of."""

    model_config = STRICT

    name: str = Field(description="module path in the teacher")
    in_shape: tuple[int, ...] = Field(description="of one example's input")
    out_shape: tuple[int, ...] = Field(description="of one example's output")


class PartInfo(BaseModel):
    """A Gaussian part."""

    model_config = STRICT

    name: str
    units: int = Field(ge=1)
    statistics: Literal["dense", "low_rank"] = Field(description="the factor: Cholesky's, or of low rank (Nystroem)")
    rank: int = Field(ge=1, description="columns of the factor")
    shrinkage: tuple[float, ...] = Field(
        default=(), description="per class: a of (1 - a) C + a (tr C / d) I, where C alone had no Cholesky factor"
    )


class BasisInfo(BaseModel):
    """An orthonormal basis of one signal."""

    model_config = STRICT

    signal: str = Field(description="`network`, or `<layer>.input` / `<layer>.activation`")
    units: int = Field(ge=1)
    columns: int = Field(ge=0)


class RecordInfo(BaseModel):
    """The header of a record."""

    model_config = STRICT

    schema_version: str = SCHEMA
    kind: RecordKind
    storage: Literal["gaussian", "exemplars"] = "gaussian"
    teacher_hash: str = Field(description="of the teacher's weights, architecture and pixel space: no other will do")
    num_classes: int = Field(ge=2)
    num_examples: tuple[int, ...] = Field(description="training examples recorded, per class")
    temperature: float = Field(default=8.0, gt=0, description="logits are divided by it")
    layers: tuple[LayerInfo, ...]
    parts: tuple[PartInfo, ...] = ()
    bases: tuple[BasisInfo, ...] = ()
    share: float | None = Field(default=None, gt=0, le=1, description="spectral: coefficients kept, per unit of signal")
    leaks: str = Field(description="what of the training data can be read off it")
    notes: dict[str, Any] = Field(default_factory=dict, description="how it was made: data set, seed, package version")


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


def decode(data: bytes, where: str, teacher_hash: str, layers: tuple[LayerInfo, ...]) -> Record:
    """The inverse of `encode`, for a record of this very teacher; `where` says in errors which file it is.

    `ValueError` for one that is damaged, of another teacher or of wrong shapes.
    """
    try:
        tensors = safetensors.torch.load(data)
        # The library tells of metadata only where it opens the file itself. Its header: size, then JSON.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        header = json.loads(metadata.get(METADATA, "null"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: not a whole record: {error}; record the teacher again") from None
    if not isinstance(header, dict) or header.get("schema_version") != SCHEMA:
        found = header.get("schema_version") if isinstance(header, dict) else None
        raise ValueError(f"{where}: schema_version is {found!r}, this version reads {SCHEMA!r}")
    info = validate(RecordInfo, header, where)
    if info.teacher_hash != teacher_hash:
        raise ValueError(
            f"{where}: recorded on teacher {info.teacher_hash[:12]}…, this one is {teacher_hash[:12]}…; "
            "use the record that was released with it"
        )
    return checked(Record(info, tensors, hashlib.sha256(data).hexdigest()), where, layers)


def checked(record: Record, where: str, layers: tuple[LayerInfo, ...]) -> Record:
    """The record, when its layers are the teacher's and every tensor has the shape that the header says."""
    info = record.info
    if info.layers != layers:
        named, own = [layer.name for layer in info.layers], [layer.name for layer in layers]
        raise ValueError(
            f"{where}: its layers are {', '.join(named)}, the teacher's {', '.join(own)}, or of other shapes"
        )
    expected = expected_shapes(info, record.tensors)
    for name, shape in expected.items():
        found = record.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            given = "missing" if found is None else "x".join(map(str, found.shape))
            raise ValueError(f"{where}: {name} is {given}, expected {'x'.join(map(str, shape))}")
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError(f"{where}: {name} has values that are not finite")
    unknown = sorted(set(record.tensors) - set(expected))
    if unknown:
        raise ValueError(f"{where}: {unknown[0]} is no tensor of a {info.kind} record ({info.storage})")
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
        n = 0 if labels is None else len(labels)
        k = 0 if indices is None or indices.ndim != 2 else indices.shape[1]
        shapes |= {"labels": (n,), "indices": (n, k), "values": (n, k)}
    return shapes


def json_schema() -> dict[str, Any]:
    """The schema of the header, as it lies beside this module."""
    return RecordInfo.model_json_schema()


def to_arrays(record: Record) -> dict[str, Any]:
    """Plain data and numpy arrays, for other processes."""
    arrays = {name: tensor.numpy() for name, tensor in record.tensors.items()}
    return {"info": record.info.model_dump(mode="json"), "tensors": arrays, "sha256": record.sha256}


def from_arrays(data: Mapping[str, Any]) -> Record:
    """The inverse of `to_arrays`."""
    info = validate(RecordInfo, data["info"], "record")
    tensors = {name: torch.tensor(array) for name, array in data["tensors"].items()}
    return checked(Record(info, tensors, data["sha256"]), "record", info.layers)
