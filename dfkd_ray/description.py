"""The pydantic model of a bundle's `teacher.json`, with strict validation: the file may be of unknown origin."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from dfkd_ray.config import STRICT
from dfkd_ray.images import PixelSpace
from dfkd_ray.text import one_line

SCHEMA = "dfkd_ray.bundle/1"
WITH_EDITS = "dfkd_ray.bundle/2"  # of bundles with shape edits; others stay readable for older versions
MAX_CLASSES = 1_000_000
MAX_IMAGE_VALUES = 2**26  # channels x height x width: 0.25 GB in float32
DATA_OPTIONS = {"attribute": str, "equal_classes": bool}  # of a data set, under notes.data


def not_boolean(value: Any) -> Any:
    """The value; `ValueError` for true and false, which pydantic would accept as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, not {str(value).lower()}")
    return value


Number = Annotated[float, BeforeValidator(not_boolean)]
Side = Annotated[int, BeforeValidator(not_boolean)]
Name = Annotated[str, Field(max_length=1000)]


class SetNote(BaseModel):
    """The note on a data set that something was measured or trained on, under notes.test_set or notes.training_set.

    `sha256`: of images and labels (test set), or of names, sizes and contents of the files (training set). `held_out`:
    sizes and hashes of some images of a training set that the training did not use.
    """

    model_config = STRICT

    name: Name
    num_images: Annotated[int, BeforeValidator(not_boolean)] = Field(ge=1)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    held_out: tuple[Annotated[str, Field(pattern="^[0-9]{1,18}-[0-9a-f]{16}$")], ...] = ()


class ShapeEdit(BaseModel):
    """The channels that one dimension of a layer keeps: see `compression.shape_edits`."""

    model_config = STRICT

    module: Name = Field(description="the layer's path in the network")
    dimension: Literal["out", "in"]
    kept: tuple[Annotated[int, Field(strict=True, ge=0, lt=MAX_IMAGE_VALUES)], ...] = Field(
        min_length=1, description="indices of the architecture's channels, ascending"
    )

    @field_validator("kept")
    @classmethod
    def _ascending(cls, kept: tuple[int, ...]) -> tuple[int, ...]:
        if any(index >= after for index, after in pairwise(kept)):
            raise ValueError("expected ascending channels, each once")
        return kept


class BundleInfo(BaseModel):
    """The contents of `teacher.json`."""

    model_config = STRICT

    schema_version: Literal["dfkd_ray.bundle/1", "dfkd_ray.bundle/2"] = SCHEMA
    architecture: Name = Field(
        description="a name of models.FAMILIES, wrn_<d>_<k>, timm:NAME, … or package.module:factory"
    )
    arguments: dict[str, Any] = Field(default_factory=dict)
    num_classes: Annotated[int, BeforeValidator(not_boolean)] = Field(ge=2, le=MAX_CLASSES)
    input_shape: tuple[Side, Side, Side] | tuple[Side, Side] = Field(
        description="channels, height, width; or channels, length for signals"
    )
    mean: tuple[Number, ...] = Field(description="per channel, in pixel units")
    std: tuple[Number, ...]
    pixel_range: tuple[Number, Number] = (0.0, 1.0)
    head: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="classes that exclude each other, or independent labels"
    )
    class_names: tuple[Name, ...] = ()
    dataset: Name | None = Field(default=None, description="what it was trained on, where known")
    test_accuracy: Number | None = Field(default=None, ge=0, le=1)
    trained: bool = Field(default=True, description="false: random weights, for tests")
    weights_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    notes: dict[str, Any] = Field(default_factory=dict, description="how it was made: command, seed, epochs, …")
    shape_edits: tuple[ShapeEdit, ...] = Field(default=(), description="what structured pruning kept of its layers")

    @model_serializer(mode="wrap")
    def _without_empty_edits(self, plain: Any) -> dict[str, Any]:
        """Schema 1, which older versions read, has no field for edits."""
        data = plain(self)
        if not self.shape_edits:
            data.pop("shape_edits", None)
        return data

    @model_validator(mode="before")
    @classmethod
    def _with_its_old_name(cls, data: Any) -> Any:
        """Read `image_shape`, as `input_shape` was called before there were signals."""
        if isinstance(data, Mapping) and "image_shape" in data and "input_shape" not in data:
            return {"input_shape" if name == "image_shape" else name: value for name, value in data.items()}
        return data

    @field_validator("input_shape", mode="before")
    @classmethod
    def _of_images_or_signals(cls, shape: Any) -> Any:
        """`ValueError` for a wrong number of sides."""
        if not isinstance(shape, list | tuple) or len(shape) not in (2, 3):
            raise ValueError("expected channels, height and width, or channels and length of signals")
        return shape

    @field_validator("notes")
    @classmethod
    def _notes_that_are_read(cls, notes: dict[str, Any]) -> dict[str, Any]:
        """Validate the notes that are used: `training` (held-out images), `data` (options of the data set), sets."""
        training, data = notes.get("training", {}), notes.get("data", {})
        if not isinstance(training, Mapping) or not isinstance(data, Mapping):
            raise ValueError("training and data must be objects")
        for name in ("num_validation", "seed"):
            value = training.get(name, 0)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"training.{name} is {one_line(repr(value), 60)}, expected an integer of at least 0")
        for name, value in data.items():
            kind = DATA_OPTIONS.get(name)
            if kind is None or not isinstance(value, kind):
                raise ValueError(f"data.{one_line(name, 60)} is none of {', '.join(DATA_OPTIONS)}, or of a wrong type")
        for name in ("test_set", "training_set"):
            if name in notes:
                SetNote.model_validate(notes[name])
        return notes

    @model_validator(mode="after")
    def _fits_together(self) -> "BundleInfo":
        if (self.schema_version == WITH_EDITS) != bool(self.shape_edits):
            raise ValueError(f"schema_version is {self.schema_version} with {len(self.shape_edits)} shape_edits")
        channels, num_values = self.input_shape[0], math.prod(self.input_shape)
        if min(self.input_shape) < 1:
            raise ValueError("input_shape must be sizes of at least 1: channels, height, width, or channels, length")
        if num_values > MAX_IMAGE_VALUES:
            raise ValueError(f"input_shape has {num_values:,} values, expected at most {MAX_IMAGE_VALUES:,}")
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, expected {channels}, one per image channel"
            )
        if min(self.std) <= 0:
            raise ValueError("std must be above 0 in every channel")
        low, high = self.pixel_range
        if low >= high:
            raise ValueError("pixel_range must be (low, high) with low < high")
        outside = next((mean for mean in self.mean if not low <= mean <= high), None)
        if outside is not None:
            raise ValueError(
                f"mean {outside:g} lies outside pixel_range ({low:g}, {high:g}): give mean and std in the units of "
                "pixel_range, or a pixel_range that is in theirs"
            )
        self._check_normalised()
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        return self

    def _check_normalised(self) -> None:
        """`ValueError` if normalised pixels are not finite in float32."""
        with np.errstate(all="ignore"):
            mean, std, ends = (np.array(values, np.float32) for values in (self.mean, self.std, self.pixel_range))
            seen = (ends[:, None] - mean) / std
        if not np.isfinite(seen).all() or not (std > 0).all():
            raise ValueError("mean, std and pixel_range give normalised pixels that are not finite in float32")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of its images: (channels, height, width). Signals are images of height 1."""
        channels, *sides = self.input_shape
        return channels, sides[0] if len(sides) == 2 else 1, sides[-1]

    @property
    def space(self) -> PixelSpace:
        """The pixel space of the network's images."""
        return PixelSpace(self.mean, self.std, *self.pixel_range)
