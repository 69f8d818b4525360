"""Networks by name, by the name of a library's network, or by a user's own import path.

`build` is the only entry point. Every family takes `num_classes` and `image_shape`; some also take `stem` ("imagenet":
7x7 or strided, or "cifar": 3x3, stride 1, no max-pool) and `width_multiplier`.
Adding a family is one function and one line in `FAMILIES`.
"""

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, cast

from torch import nn

from dfkd_ray.models import (
    adapting,
    checks,
    cifar_resnet,
    libraries,
    torchvision_families,
    wide_resnet,
    without_batchnorm,
)
from dfkd_ray.models.checks import check_output, guarded, shown
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import reason

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    **torchvision_families.FAMILIES,
    **cifar_resnet.FAMILIES,
    **without_batchnorm.FAMILIES,
}
WRN_NAME = re.compile(r"wrn_([0-9]+)_([0-9]+)")
# The folder searched for modules of import paths after the standard path; None: the working folder.
CODE: ContextVar[str | None] = ContextVar("CODE", default=None)


def build(
    architecture: str,
    arguments: dict[str, Any],
    *,
    num_classes: int,
    image_shape: Sequence[int],
    finished: bool = True,
) -> nn.Module:
    """Build an untrained network in eval mode.

    `architecture` is a name of `FAMILIES`, `wrn_<depth>_<width>`, a library's network (see `libraries`), or an import
    path `package.module:factory`, whose factory is called with `arguments` only. `ValueError` for an unknown name, for
    arguments that the architecture does not take, for a named network that is too large (checked before allocation),
    for a factory that fails or exits, or for a network whose output for one image is not `(1, num_classes)`. A network
    of the user's own or of a library is checked and adapted, unless the caller wants to load weights under the names of
    its code first, and then calls `finish`.
    """
    checks.check_shapes(architecture, num_classes, image_shape)
    own_code = module_of(architecture) is not None
    if own_code:
        make, kwargs = import_factory(architecture), dict(arguments)
    elif libraries.split(architecture):
        make, kwargs = libraries.builder(architecture, arguments, num_classes, image_shape)
        checks.check_library(architecture, make, kwargs, image_shape)
    else:
        make, kwargs = family(architecture), named_arguments(architecture, arguments, num_classes, image_shape)
        state_bytes(architecture, arguments, num_classes, image_shape)
    check_arguments(architecture, make, kwargs, arguments)
    with importable() if own_code else nullcontext():
        with guarded(f"{shown(architecture)} cannot be built"):
            network = make(**kwargs)
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"{shown(architecture)} returned {one_line(type(network).__name__, 60)}, expected a torch.nn.Module"
            )
        with guarded(f"{shown(architecture)} has no eval mode"):
            network.eval()
        with guarded(f"{shown(architecture)} does not take images of {'x'.join(map(str, image_shape))}"):
            adapting.initialise_lazy(network, image_shape)
        if own_code:  # a factory may give one object again and again
            network = adapting.copied(network)
        if finished:
            finish(network, architecture, num_classes, image_shape)
    return network


def module_of(architecture: str) -> str | None:
    """The module of the user's code that an architecture names, which is imported only if it is trusted; else None."""
    module, colon, _ = architecture.partition(":")
    return module if colon and not libraries.split(architecture) else None


def finish(network: nn.Module, architecture: str, num_classes: int, image_shape: Sequence[int]) -> nn.Module:
    """Check and adapt a network that is no named family's (those are checked before they are built), in place.

    Returns it. `ValueError` as from `build`.
    """
    if architecture in FAMILIES or WRN_NAME.fullmatch(architecture):
        return network
    if len(image_shape) == 2:
        network.register_forward_pre_hook(adapting.as_signals)
        image_shape = (image_shape[0], 1, image_shape[1])
    with guarded(f"{shown(architecture)} has weights that cannot be made float32"):
        adapting.to_float32(network)
    checks.check_state(network, architecture)
    with guarded(f"{shown(architecture)} has weights that cannot be made plain parameters"):
        adapting.bake(network)
    check_output(network, architecture, num_classes, image_shape)
    adapting.adapt(network, architecture, num_classes, image_shape)
    return network


def named_arguments(
    architecture: str, arguments: dict[str, Any], num_classes: int, image_shape: Sequence[int]
) -> dict[str, Any]:
    """The keyword arguments of a family's builder. `ValueError` for names that the bundle sets, or an invalid width."""
    taken = sorted({"num_classes", "image_shape"} & set(arguments))
    if taken:
        raise ValueError(f"{shown(architecture)}: {taken[0]} is given by the bundle, not in its arguments")
    checks.require_images(architecture, image_shape)
    width = arguments.get("width_multiplier", 1.0)
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < 1e3:
        raise ValueError(
            f"{shown(architecture)}: width_multiplier is {one_line(repr(width), 60)}, expected a number above 0"
        )
    return {"num_classes": num_classes, "image_shape": tuple(image_shape), **arguments}


def check_arguments(
    architecture: str, make: Callable[..., nn.Module], kwargs: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """`ValueError` for arguments that a builder does not take."""
    try:
        inspect.signature(make).bind(**kwargs)
    except TypeError as error:
        names = one_line(sorted(arguments), 100)
        raise ValueError(f"{shown(architecture)}: {one_line(error, 100)}; arguments given: {names}") from None
    except ValueError:  # the builder has no inspectable signature: the call will raise
        pass


def state_bytes(architecture: str, arguments: dict[str, Any], num_classes: int, image_shape: Sequence[int]) -> int:
    """Bytes of all tensors of a named network, without allocating them; `ValueError` as from `build`."""
    checks.check_shapes(architecture, num_classes, image_shape)
    return _state_bytes(architecture, checks.key_of(arguments), num_classes, tuple(image_shape))


@lru_cache(maxsize=256)
def _state_bytes(architecture: str, arguments: str, num_classes: int, image_shape: tuple[int, ...]) -> int:
    plain = json.loads(arguments)
    make, kwargs = family(architecture), named_arguments(architecture, plain, num_classes, image_shape)
    check_arguments(architecture, make, kwargs, plain)
    return checks.measured(architecture, make, kwargs, num_classes, image_shape)


def family(architecture: str) -> Callable[..., nn.Module]:
    """The builder of a named architecture; `ValueError` lists the known names."""
    match = WRN_NAME.fullmatch(architecture)
    if match and max(len(match[1]), len(match[2])) > 6:
        raise ValueError(f"{shown(architecture)}: expected a depth and a width that a network can have")
    if match:
        depth, width = int(match[1]), int(match[2])
        return wide_resnet.builder(depth, width)
    if architecture not in FAMILIES:
        raise ValueError(
            f"unknown {shown(architecture)}; expected one of {', '.join(sorted(FAMILIES))}, "
            "wrn_<depth>_<width>, timm:NAME, torchvision:NAME, or package.module:factory"
        )
    return FAMILIES[architecture]


def code_folder() -> str | None:
    """The folder searched for modules of import paths after the standard path; None if it does not exist."""
    folder = CODE.get()
    if folder is None:
        with suppress(OSError):
            folder = os.getcwd()
    return folder


@contextmanager
def code_from(folder: str | None) -> Iterator[None]:
    """While open, search modules of import paths in `folder`, the code folder of the process that sent it."""
    token = CODE.set(folder)
    try:
        yield
    finally:
        CODE.reset(token)


@contextmanager
def importable() -> Iterator[None]:
    """While open, modules in `code_folder` can be imported; they never replace an installed module.

    It is used only around code that the user has named, so that files in the working folder never run unasked.
    """
    folder = code_folder()
    if folder is None:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        for index in reversed(range(len(sys.path))):
            if sys.path[index] == folder:
                del sys.path[index]
                break


def untrusted_module(architecture: str, trust_code: Sequence[str]) -> str | None:
    """The module that an architecture would import if `trust_code` has neither it nor a package above it; else None."""
    module = module_of(architecture)
    return None if module is None or any(covers(name, module) for name in trust_code) else module


def covers(trusted: str, module: str) -> bool:
    """Whether a module is the trusted one, or lies below it."""
    return trusted != "" and f"{module}.".startswith(f"{trusted}.")


def import_factory(path: str) -> Callable[..., nn.Module]:
    """Import `package.module:factory`, or `package.module:Class.factory`.

    The caller must have checked that the user trusts this module. The names after the colon do not lead through other
    packages that it has imported, nor through `__names__`: the user has not trusted those.
    """
    module_name, _, names = path.partition(":")
    module = one_line(module_name, 60)
    try:
        with importable():
            named = found = importlib.import_module(module_name)
            for name in names.split("."):
                foreign = inspect.ismodule(found) and found is not named and not covers(module_name, found.__name__)
                found = None if foreign or name.startswith("__") else getattr(found, name, None)
    except ImportError as error:
        raise ValueError(f"{shown(path)}: cannot import {module!r} ({one_line(error, 120)})") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user's may raise anything, or leave
        raise ValueError(f"{shown(path)}: cannot import {module!r} ({reason(error)})") from None
    if not callable(found):
        raise ValueError(f"{shown(path)}: {module!r} has no callable {one_line(names, 60)!r}")
    return cast(Callable[..., nn.Module], found)
