"""Efforts: named sets of fields, from a first answer in minutes to what a night can do. A field that is set stays."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from dfkd_ray.plain import given

Effort = Literal["fast", "standard", "thorough"]
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "synthesis": {"num_steps": 30},
        "bn_num_images": 256,
        "enough_kl": 0.05,
        "distillation": {"num_images": 256, "num_steps": 40},
        "reconstruction": {"num_images": 512},
        "reference": {"num_images": 64, "synthesis": {"batch_size": 64, "num_steps": 30}},
    },
    "standard": {},
    "thorough": {
        "synthesis": {"num_steps": 100},
        "bn_num_images": 4096,
        "distillation": {"num_images": 4096, "num_steps": 3000},
        "reconstruction": {"num_images": 4096},
        "reference": {"num_images": 512},
    },
}


def with_effort(data: Mapping[str, Any], effort: str) -> dict[str, Any]:
    """A trial's nested data with the fields of an effort beneath it; `ValueError` for an unknown name.

    An effort says how DeepInversion makes images: where `data` names another method, these fields are left out.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort {given(effort)}: expected {', '.join(get_args(Effort))}")
    return beneath(EFFORTS[effort], data)


def beneath(fields: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the `fields` that it does not set."""
    if data.get("method", "deepinversion") != "deepinversion":
        return dict(data)
    if data.get("num_passes") is not None:  # it says the number of steps
        fields = {name: value for name, value in fields.items() if name != "num_steps"}
    result = {**fields, **data}
    for name, value in fields.items():
        if isinstance(value, Mapping) and isinstance(data.get(name, {}), Mapping):
            result[name] = beneath(value, data.get(name, {}))
    return result
