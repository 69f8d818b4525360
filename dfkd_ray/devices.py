"""Device, precision, threads and determinism: all settings that can change the last bits of a result."""

import functools
import inspect
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfkd_ray.images import PixelSpace

Optimiser = TypeVar("Optimiser", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class Runtime:
    """Device, pixel space, precision and threads with which networks run."""

    device: torch.device
    space: PixelSpace
    precision: str = "float32"
    num_threads: int = 1
    fast: bool = False

    def autocast(self) -> Any:
        """The context in which a network runs."""
        return autocast(self.precision, self.device)

    def numerics(self) -> AbstractContextManager[None]:
        """The context for threads, TF32 and determinism: see `numerics`."""
        return numerics(self.precision, self.device, self.num_threads, self.fast)


def resolve(device: str) -> torch.device:
    """The torch device; "auto" is CUDA if available. `ValueError` if CUDA is requested and missing."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device=cuda`: this torch sees no CUDA device; use `device=cpu` or auto")
    return torch.device(device)


def hide_gpus() -> None:
    """Hide all CUDA devices from this process: "auto" is then the CPU. Call it before CUDA is initialised."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


CONTIGUOUS = "dfkd_ray_contiguous"  # an attribute of networks that do not run on channels-last images


def layout(network: nn.Module, *, channels_last: bool = True) -> torch.memory_format:
    """The memory format that a network runs in: channels last, unless that is not wanted or the network fails on it."""
    wanted = channels_last and not getattr(network, CONTIGUOUS, False)
    return torch.channels_last if wanted else torch.contiguous_format


def place(network: nn.Module, device: torch.device, *, channels_last: bool = True) -> nn.Module:
    """Move a network to a device, with convolution weights in channels-last (or contiguous) layout."""
    return network.to(device).to(memory_format=layout(network, channels_last=channels_last))  # type: ignore[call-overload]


def laid_out(images: Tensor, network: nn.Module, *, channels_last: bool = True) -> Tensor:
    """Images in the memory format that a network runs in; signals (n, channels, length) are contiguous."""
    if images.ndim != 4:
        return images.contiguous()
    return images.contiguous(memory_format=layout(network, channels_last=channels_last))


def check_precision(precision: str, device: torch.device, fast: bool = False) -> None:
    """`ValueError` for an option that would silently do nothing on this device."""
    if fast and device.type != "cuda":
        raise ValueError("fast acts on CUDA only (autotuned, non-deterministic kernels); leave it out on this device")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("precision tf32 acts on CUDA only; use bfloat16 or float32 on this device")


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes bfloat16 natively instead of emulating it.

    A CPU with only AVX2 emulates it: a step of the bundled ResNet-8 takes 7 times as long as in float32 (AMD EPYC, one
    thread, torch 2.14).
    """
    if device.type != "cpu":
        return True
    asks = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return True if asks is None else bool(asks())


def autocast(precision: str, device: torch.device) -> Any:
    """The autocast context for `precision`; parameters and gradients stay float32.

    On a CPU that only emulates bfloat16 the network runs in float32, which is faster and more exact there. The numerics
    class records this.
    """
    if precision == "bfloat16" and has_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def numerics(precision: str, device: torch.device, num_threads: int, fast: bool = False) -> Iterator[None]:
    """Set threads, TF32 and determinism while open; the previous settings are restored.

    CUDA uses deterministic algorithms without autotuning unless `fast`. An operation without a deterministic version
    runs with a warning.
    """
    check_precision(precision, device, fast)
    before = (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
    if before[0] != num_threads:
        torch.set_num_threads(num_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = fast
    torch.backends.cudnn.deterministic = not fast
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
        torch.use_deterministic_algorithms(not fast, warn_only=True)
    try:
        yield
    finally:
        if before[0] != num_threads:
            torch.set_num_threads(before[0])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1], before[2]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[3], before[4]
        if device.type == "cuda":
            torch.use_deterministic_algorithms(before[5], warn_only=True)


def numerics_class(device: torch.device) -> str:
    """A text that is equal on machines with bit-identical results: device model or instruction set, torch version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    imitated = "" if has_bfloat16(torch.device("cpu")) else " without bfloat16"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{imitated}, torch {torch.__version__}"


def without_compiler(kind: type[Optimiser]) -> type[Optimiser]:
    """An optimiser class that never imports PyTorch's compiler; it computes what the given class computes.

    PyTorch's optimisers import `torch._dynamo` when they are made and at each step, although nothing is compiled
    here: seconds of CPU time in every process of a sweep.
    """
    own: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad")}
    own["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    made: Any = type(kind.__name__, (kind,), own)
    return made


Adam = without_compiler(torch.optim.Adam)
SGD = without_compiler(torch.optim.SGD)
