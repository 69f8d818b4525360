"""What a written file says of itself: texts by name, which each format stores in its own way."""

import json
from collections.abc import Mapping
from typing import Any

import dfkd_ray
from dfkd_ray.bundles import Teacher

SCHEMA = "dfkd_ray.export/1"
INPUT, OUTPUT = "images", "logits"  # names of the exported network's input and output
INPUT_NOTE = "normalised pixels, (pixel - mean) / std per channel, float32 (batch, *input_shape); any batch size"


def texts(teacher: Teacher, **more: object) -> dict[str, str]:
    """The metadata of a file; values other than text are JSON.

    `test_accuracy` is of the float32 network, where it is known: the accuracy of an int8 file is another one.
    """
    info = teacher.info
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "package_version": dfkd_ray.__version__,
        "network": teacher.name,
        "weights_sha256": info.weights_sha256,
        "input": INPUT_NOTE,
        "input_shape": info.input_shape,
        "mean": info.mean,
        "std": info.std,
        "pixel_range": info.pixel_range,
        "output": "logits of classes that exclude each other" if info.head == "softmax" else "logits, one per label",
        "head": info.head,
        "num_classes": info.num_classes,
        "class_names": info.class_names,
        "test_accuracy": info.test_accuracy,
        **more,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def read(found: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `texts`."""
    plain = {"schema", "package_version", "network", "weights_sha256", "input", "output", "head", "format", "precision"}
    return {name: value if name in plain else json.loads(value) for name, value in found.items()}
