"""Networks by name, or by a user's own import path.

`build` is the one entry: every family takes `num_classes` and `image_shape` and, where it has them, `stem`
("imagenet": 7x7 or strided, or "cifar": 3x3, stride 1, no max-pool) and `width_multiplier`.
Adding a family is one function and one line in `FAMILIES`.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from dfkd_ray.models import cifar_resnet, torchvision_families, wide_resnet, without_batchnorm

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    **torchvision_families.FAMILIES,
    **cifar_resnet.FAMILIES,
    **without_batchnorm.FAMILIES,
}
WRN_NAME = re.compile(r"wrn_(\d+)_(\d+)")


def build(architecture: str, arguments: dict[str, Any], *, num_classes: int, image_shape: Sequence[int]) -> nn.Module:
    """Build an untrained network in eval mode.

    `architecture` is a name of `FAMILIES`, `wrn_<depth>_<width>`, or an import path `package.module:factory`,
    whose factory is called with `arguments` alone. Raises `ValueError` for an unknown name, arguments that the
    architecture does not take, or a network whose output for one image is not `(1, num_classes)`.
    """
    if ":" in architecture:
        make, kwargs = import_factory(architecture), dict(arguments)
    else:
        make = family(architecture)
        taken = sorted({"num_classes", "image_shape"} & set(arguments))
        if taken:
            raise ValueError(f"architecture {architecture!r}: {taken[0]} is given by the bundle, not in its arguments")
        width = arguments.get("width_multiplier", 1.0)
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < 1e3:
            raise ValueError(f"architecture {architecture!r}: width_multiplier is {width!r}, expected a number above 0")
        kwargs = {"num_classes": num_classes, "image_shape": tuple(image_shape), **arguments}
    try:
        inspect.signature(make).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"architecture {architecture!r}: {error}; arguments given: {sorted(arguments)}") from None
    network = make(**kwargs)
    if not isinstance(network, nn.Module):
        raise ValueError(f"architecture {architecture!r} returned {type(network).__name__}, expected a torch.nn.Module")
    network.eval()
    check_output(network, architecture, num_classes, image_shape)
    return network


def family(architecture: str) -> Callable[..., nn.Module]:
    """The builder of a named architecture; `ValueError` lists the names there are."""
    match = WRN_NAME.fullmatch(architecture)
    if match:
        depth, width = int(match[1]), int(match[2])
        return wide_resnet.builder(depth, width)
    if architecture not in FAMILIES:
        raise ValueError(
            f"unknown architecture {architecture!r}; expected one of {', '.join(sorted(FAMILIES))}, "
            "wrn_<depth>_<width>, or an import path package.module:factory"
        )
    return FAMILIES[architecture]


def import_factory(path: str) -> Callable[..., nn.Module]:
    """Import `package.module:factory`. The caller has made sure that the user trusts that module."""
    module_name, _, name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"architecture {path!r}: cannot import {module_name!r} ({error})") from None
    if not callable(factory):
        raise ValueError(f"architecture {path!r}: {module_name!r} has no callable {name!r}")
    return cast(Callable[..., nn.Module], factory)


@torch.no_grad()
def check_output(network: nn.Module, architecture: str, num_classes: int, image_shape: Sequence[int]) -> None:
    """Run one blank image through: a wrong class count or image shape is found here, not an hour later."""
    channels, height, width = image_shape
    try:
        logits = network(torch.zeros(1, channels, height, width))
    except Exception as error:  # noqa: BLE001 - a network of the user's may fail in any way of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"architecture {architecture!r} does not take images of {channels}x{height}x{width}: {reason}"
        ) from None
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise ValueError(
            f"architecture {architecture!r} gives {shape} for one image, expected (1, {num_classes}): "
            "check the class count"
        )
