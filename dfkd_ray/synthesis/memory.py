"""Batch sizes that fit into memory: the rule behind `batch_size: auto`.

The method's default is halved until a batch needs no more than its share of memory. A step is taken to need twice what
PyTorch keeps of a forward pass for the gradient, in float32: measured peaks were 1.3 to 2.6 times that (ResNet-18,
EfficientNet-Lite0, DenseNet-121 and MobileNetV3 at 64 to 96 pixels, on a CPU; the last with 0.9 MB an image, where the
process's own memory shows). The share is half of the machine's memory, divided by the pieces of work that it runs at
once (its cores by `num_threads`), or a quarter of a GPU's. It is the total memory, not what is free at the moment: the
same machine always gives the same size.
"""

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import batchnorm, devices, untrusted
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import METHODS

SMALLEST = 8  # images; BatchNorm statistics of fewer say little
OVERHEAD = 2
STEP_BYTES: dict[tuple[str, bool], int] = {}  # by the teacher's hash: a sweep asks for each of its trials


def share_bytes(device: torch.device, num_threads: int) -> int:
    """The memory that one batch may need on a device of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    at_once = max(1, len(os.sched_getaffinity(0)) // num_threads)
    return untrusted.total_bytes() // 2 // at_once


def step_bytes(teacher: Teacher, *, trained: bool = False) -> int:
    """Memory that a step needs for each image: for the gradient of the image, or of the weights with `trained`."""
    known = (teacher.hash, trained)
    if known not in STEP_BYTES:
        one, two = (kept_bytes(teacher.network, teacher.info.image_shape, num, trained) for num in (1, 2))
        STEP_BYTES[known] = OVERHEAD * (two - one)
    return STEP_BYTES[known]


def kept_bytes(network: nn.Module, image_shape: tuple[int, ...], num_images: int, trained: bool) -> int:
    """Bytes that PyTorch keeps for the gradient after a forward pass, without the network's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors stay alive, and so their addresses are unique

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad != trained]
    for parameter in wanted:
        parameter.requires_grad_(trained)
    images = torch.zeros(num_images, *image_shape, requires_grad=not trained)
    recording = batchnorm.recorded(network) if batchnorm.layers(network) and not trained else nullcontext()
    try:
        with recording, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(devices.laid_out(images, network))
    finally:
        for parameter in wanted:
            parameter.requires_grad_(not trained)
    return sum(num_bytes for num_bytes, _ in kept.values())


def fitting_batch_size(teacher: Teacher, config: Any, device: torch.device, where: str) -> int:
    """The batch size that `auto` stands for. `ValueError`, with the config's name `where`, if no small batch fits."""
    size = METHODS[config.method].config().batch_size  # type: ignore[attr-defined]
    share, image = share_bytes(device, config.num_threads), step_bytes(teacher)
    while size * image > share and size > SMALLEST:
        size = max(SMALLEST, size // 2)
    if size * image > share:
        raise ValueError(
            f"{where}.batch_size=auto: {size} images of {'x'.join(map(str, teacher.info.input_shape))} need about "
            f"{untrusted.size(size * image)}, and a batch may take {untrusted.size(share)} of this machine's memory; "
            "give a number"
        )
    return size


def excess(teacher: Teacher, batch_size: int, device: torch.device, num_threads: int, *, trained: bool = False) -> str:
    """Why a batch may not fit into this machine's memory, for a warning; empty if it does."""
    needed = batch_size * step_bytes(teacher, trained=trained)
    share = share_bytes(device, num_threads)
    if needed <= share:
        return ""
    return (
        f"needs about {untrusted.size(needed)}, and has {untrusted.size(share)} of this machine's memory as its share"
    )
