"""Pydantic models of a record's header. `format` describes the whole file, with its tensors."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, Field

from dfkd_ray.config import STRICT, RecordKind

SCHEMA = "dfkd_ray.record/1"
KINDS: tuple[RecordKind, ...] = get_args(RecordKind)
SPECTRAL = ("spectral", "spectral_pairs")
STORAGES = ("gaussian", "exemplars")


class LayerInfo(BaseModel):
    """A layer whose outputs are recorded."""

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
