"""The description of a network in memory: what images it takes and what it gives, in the words of its user."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

Numbers = int | float | Sequence[int | float] | np.number | np.ndarray | Tensor


class Description(TypedDict, total=False):
    """What a network in memory does not say of itself; what has no default in `DEFAULTS` is needed.

    `input_shape`: (channels, height, width), or (channels, length) for signals; `image_shape` is its older name. `mean`
    and `std` normalise the network's images: one number, or one per channel, in the units of `pixel_range`.
    """

    input_shape: Numbers
    image_shape: Numbers
    num_classes: int
    mean: Numbers
    std: Numbers
    pixel_range: tuple[float, float]
    head: str
    name: str


DEFAULTS = Description(pixel_range=(0.0, 1.0), head="softmax", name="network")
NEEDED = ("input_shape", "num_classes", "mean", "std")


def completed(given: dict[str, Any]) -> dict[str, Any]:
    """A description with its defaults, its shape a tuple, `mean` and `std` one number per channel.

    `TypeError` for an unknown name, `ValueError` that names what is missing.
    """
    unknown = given.keys() - Description.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"unexpected keyword argument {min(unknown)!r}: expected {', '.join(Description.__annotations__)}"
        )
    older = given.pop("image_shape", ())
    if np.size(given.get("input_shape", ())) == 0 and np.size(older) > 0:
        given["input_shape"] = older
    missing = [name for name in NEEDED if name not in given]
    if missing:
        raise ValueError(f"a network in memory needs {', '.join(missing)}: say what images it takes")
    shape = plain_numbers(given["input_shape"])
    channels = shape[0] if shape and isinstance(shape[0], int) else 1
    numbers = {
        name: plain_numbers(given[name]) * (channels if np.ndim(given[name]) == 0 else 1) for name in ("mean", "std")
    }
    return {**DEFAULTS, **given, **numbers, "input_shape": shape}


def plain_numbers(values: Any) -> tuple[Any, ...]:
    """A number, or a sequence, array or tensor of numbers, as Python's own."""
    return tuple(np.asarray(values).ravel().tolist())
