"""Checks of a network before use: its size, before memory is allocated, and the form of its output.

Named families are first built on PyTorch's meta device, where tensors have shapes but no memory. A forward pass of no
images gives the sizes of all layer outputs too. The user's own code cannot be checked that way: it is run once.
"""

import json
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfkd_ray import untrusted
from dfkd_ray.compression import pruning
from dfkd_ray.description import MAX_CLASSES, MAX_IMAGE_VALUES
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import reason, size

MAX_PARAMETERS = 1_000_000_000  # seven times the largest family
STORED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
MAX_VALUES = 2**27  # of one layer's output for one image: 0.5 GB in float32


class WithoutValues(TorchFunctionMode):
    """While active, random initial values are not drawn: tensors on the meta device have no values.

    PyTorch would do so in Python there, and import its compiler (seconds of CPU time).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def shown(architecture: str) -> str:
    """An architecture's name for an error message."""
    return f"architecture {one_line(architecture, 80)!r}"


@contextmanager
def guarded(says: str) -> Iterator[None]:
    """Turn every exception of foreign code in the body, `SystemExit` included, into a one-line `ValueError`."""
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user's may raise anything, or leave
        raise ValueError(f"{says}: {reason(error)}") from None


def raised_by_network(error: BaseException) -> bool:
    """Whether an exception has left a module's `forward` that is neither PyTorch's nor ours."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(owner, nn.Module) and type(owner).__module__.partition(".")[0] not in ("torch", "dfkd_ray"):
            return True
    return False


def check_shapes(architecture: str, num_classes: int, image_shape: Sequence[int]) -> None:
    """`ValueError` for class counts or image shapes outside the supported range."""
    if not 2 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"{shown(architecture)}: {num_classes:,} classes, expected 2 to {MAX_CLASSES:,}")
    if len(image_shape) not in (2, 3) or min(image_shape) < 1 or math.prod(image_shape) > MAX_IMAGE_VALUES:
        raise ValueError(
            f"{shown(architecture)}: images of {one_line('x'.join(map(str, image_shape)), 60)}, expected channels, "
            f"height and width (signals: channels and length) of at least 1, at most {MAX_IMAGE_VALUES:,} values"
        )


def require_images(architecture: str, shape: Sequence[int]) -> None:
    """`ValueError` for a shape of signals: all networks by name take images."""
    if len(shape) == 2:
        raise ValueError(
            f"{shown(architecture)} takes images: expected channels, height and width, not channels and length "
            f"{'x'.join(map(str, shape))}"
        )


def measured(
    architecture: str,
    make: Callable[..., nn.Module],
    arguments: Mapping[str, Any],
    num_classes: int,
    shape: Sequence[int],
) -> int:
    """Bytes of a named network's tensors, without using them; `ValueError` if it is too large or its output wrong."""
    try:
        with torch.device("meta"), WithoutValues():
            network = make(**arguments).eval()
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - excessive sizes overflow with various exceptions
        raise ValueError(f"{shown(architecture)} cannot be built: {reason(error)}") from None
    num_bytes = check_size(network, architecture)
    for module in network.modules():
        module.register_forward_hook(bounded)
    # This memory is neither initialised nor touched.
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in network.state_dict().items()}
    network.load_state_dict(empty, assign=True)
    check_output(network, architecture, num_classes, shape, compute=False)
    return num_bytes


def check_size(network: nn.Module, architecture: str) -> int:
    """Bytes of the tensors of a network on the meta device; `ValueError` if they do not fit this machine."""
    num = pruning.num_parameters(network)
    if num > MAX_PARAMETERS:
        raise ValueError(
            f"{shown(architecture)} has {num:,} parameters, expected at most {MAX_PARAMETERS:,}; "
            "lower its width or depth"
        )
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    free = untrusted.free_bytes()
    if num_bytes > free:
        raise ValueError(f"{shown(architecture)} takes {size(num_bytes)}, this machine has {size(free)} of memory free")
    return num_bytes


class TooLargeError(RuntimeError):
    """A layer gives more values than are supported."""


def bounded(module: nn.Module, _given: Any, answer: Any) -> None:
    """A forward hook: `TooLargeError` for a layer that gives more than `MAX_VALUES` values an image."""
    num_values = math.prod(answer.shape[1:]) if isinstance(answer, Tensor) else 0
    if num_values > MAX_VALUES:
        raise TooLargeError(
            f"one {type(module).__name__} gives {num_values:,} values an image, expected at most {MAX_VALUES:,}"
        )


def check_library(
    architecture: str, make: Callable[..., nn.Module], arguments: Mapping[str, Any], image_shape: Sequence[int]
) -> None:
    """`ValueError` for a library's network that is too large. One that cannot tell without memory is built unchecked.

    Its forward pass runs on the meta device, on no image.
    """
    try:
        with torch.device("meta"), WithoutValues(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = make(**arguments).eval()
    except Exception:  # noqa: BLE001 - it will be raised again where memory is allocated, or is of the meta device
        return
    check_size(network, architecture)
    for module in network.modules():
        module.register_forward_hook(bounded)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network(torch.empty(0, *image_shape, device="meta"))
    except TooLargeError as error:
        line = one_line(error, 140)
        raise ValueError(
            f"{shown(architecture)} does not take images of {'x'.join(map(str, image_shape))}: {line}"
        ) from None
    except Exception:  # noqa: BLE001 - as above
        return


def key_of(arguments: Mapping[str, Any]) -> str:
    """Arguments as JSON text; `ValueError` if a bundle cannot store them."""
    try:
        return json.dumps(dict(arguments), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"arguments of an architecture must be plain JSON: {reason(error)}") from None


def check_state(network: nn.Module, architecture: str) -> None:
    """`ValueError` for a network with tensors on the meta device, or with more than tensors in its state dict."""
    with guarded(f"{shown(architecture)} has no state dict"):
        state = network.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{shown(architecture)} keeps {one_line(name, 60)}, which is no tensor: no bundle holds it"
            )
        if tensor.dtype not in STORED or tensor.is_quantized:
            raise ValueError(
                f"{shown(architecture)} keeps {one_line(name, 60)} in {tensor.dtype}, which no bundle holds (expected "
                "floating-point numbers of 16 to 64 bits, integers or booleans)"
            )
        if tensor.is_meta:
            raise ValueError(f"{shown(architecture)}: {one_line(name, 60)} is on the meta device and has no values")


@torch.no_grad()
def check_output(
    network: nn.Module,
    architecture: str,
    num_classes: int,
    image_shape: Sequence[int],
    *,
    compute: bool = True,
) -> None:
    """Run one blank image through the network, to find a wrong class count or image shape early.

    Without `compute`, a batch of no images: PyTorch then follows the shapes alone.
    """
    try:
        logits = network(torch.zeros(int(compute), *image_shape, device="cpu"))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a network of the user's may fail in any way of its own
        line = one_line((str(error) or type(error).__name__).splitlines()[0], 140)
        raise ValueError(
            f"{shown(architecture)} does not take images of {'x'.join(map(str, image_shape))}: {line}"
        ) from None
    num_images = int(compute)
    if logits_of(logits, num_classes, num_images) is None:
        raise ValueError(f"{shown(architecture)} gives {not_logits(logits, num_classes, num_images)}")


def logits_of(answer: Any, num_classes: int, num_images: int | None = None) -> Tensor | None:
    """The logits (num_images, num_classes) in a network's output, or None.

    Of an output object or a dict, `logits` comes first; else the first tensor of that shape is taken. Further axes of
    length 1 are dropped.
    """
    return next((flat for _, flat in all_logits(answer, num_classes, num_images)), None)


def all_logits(answer: Any, num_classes: int, num_images: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The parts of an output that have the shape of logits, with their names, likeliest first."""
    if isinstance(answer, Tensor):
        found = [("", answer)]
    elif isinstance(answer, Mapping):
        names = dict.fromkeys([*(name for name in ("logits", "out") if name in answer), *answer])
        found = [(one_line(name, 30), answer[name]) for name in names]
    else:
        found = [("logits", answer.logits)] if hasattr(answer, "logits") else []
        parts = enumerate(answer, 1) if isinstance(answer, tuple | list) else ()
        found += [(f"part {place}", part) for place, part in parts if not found or part is not found[0][1]]
    for name, value in found:
        flat = (
            value.flatten(1) if isinstance(value, Tensor) and value.ndim > 2 and set(value.shape[2:]) == {1} else value
        )
        if is_logits(flat, num_classes, num_images):
            yield name, flat


def taken_out_of(answer: Any, num_classes: int, num_images: int) -> str:
    """The kind of an output, which of its parts are the logits, and which other part could be."""
    names = [name for name, _ in all_logits(answer, num_classes, num_images)]
    if not names[0]:
        return kind(answer)
    rival = f", though {names[1]} has the same shape" if len(names) > 1 and names[0] not in ("logits", "out") else ""
    return f"{kind(answer)} ({names[0]}{rival})"


def is_logits(answer: Any, num_classes: int, num_images: int | None = None) -> bool:
    """Whether an output is a floating-point tensor of shape (num_images, num_classes)."""
    return (
        isinstance(answer, Tensor)
        and answer.is_floating_point()
        and answer.ndim == 2
        and answer.shape[1] == num_classes
        and (num_images is None or num_images == len(answer))  # alone, `len` would fix the batch size of an export
    )


def not_logits(answer: Any, num_classes: int, num_images: int | None = None) -> str:
    """What an output is that holds no logits, and what was expected."""
    many = {None: "", 0: " for no image", 1: " for one image"}.get(num_images, f" for {num_images} images")
    shape = f"({'n' if num_images is None else num_images}, {num_classes})"
    if not isinstance(answer, Tensor):
        what = f"{one_line(type(answer).__name__, 60)}{many} ({parts(answer)})"
        return f"{what}, expected a tensor of shape {shape}: its forward must return the logits, alone or first"
    if not answer.is_floating_point():
        return f"{answer.dtype}{many}, expected floating-point logits of shape {shape}"
    given = f"{one_line(tuple(answer.shape), 60)}{many}, expected {shape}"
    if num_images == 1 and tuple(answer.shape) == (num_classes,):
        return f"{given}: it drops the axis of a single image; name the axes in its squeeze(), or use flatten(1)"
    if num_classes == 2 and answer.numel() == num_images:
        return f"{given}: of one logit x for two classes, let forward return torch.stack([0 * x, x], 1).flatten(1)"
    if answer.ndim != 2 or len(answer) != num_images:
        return f"{given}: its forward must return the logits, alone or first"
    return f"{given}: check the class count"


def parts(answer: Any, most: int = 4) -> str:
    """A short description of an output that is not a tensor."""
    if isinstance(answer, Mapping):
        found = [f"{one_line(name, 30)}: {kind(value)}" for name, value in list(answer.items())[:most]]
    elif isinstance(answer, tuple | list):
        found = [kind(value) for value in answer[:most]]
    else:
        return "no tensor"
    return ", ".join(found) + (", …" if len(answer) > most else "") if found else "empty"


def kind(value: Any) -> str:
    """A value's type; for a tensor also its shape."""
    if isinstance(value, Tensor):
        return f"tensor of {'x'.join(map(str, value.shape)) or 'no dimension'}"
    return one_line(type(value).__name__, 30)
