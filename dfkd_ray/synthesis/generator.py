"""Image generators, and the state of one as arrays that travel from round to round.

A generator maps inputs z ~ N(0, 1) to images. It is a linear layer to a coarse grid, then stages of doubling,
convolution and BatchNorm, and a sigmoid over the pixel range. The doublings end at the exact size, so any size works:
the grid has 7 to 13 pixels along an image's longer side from 14 pixels on, and at least 4 along the shorter one (fewer
if the image has fewer). Source: Radford et al. 2016, arXiv 1511.06434, section 3; nearest upsampling takes the place of
its transposed convolutions, as usual in data-free distillation (Fang et al. 2021, arXiv 2105.08584).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfkd_ray import devices
from dfkd_ray.images import PixelSpace

SLOPE = 0.2  # of the leaky ReLUs
INIT_STD = 0.02
BETAS = (0.5, 0.999)  # of Adam, for every generator

GENERATOR, ADAM = "generator.", "adam."  # what the names of a generator's arrays and of its moments begin with

Arrays = dict[str, np.ndarray]


def grids(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of the stages of a generator, coarsest first; the last is the image's."""
    stages = max(0, int(math.log2(max(height, width) / 7)))
    return [
        (max(min(height, 4), -(-height // 2**level)), max(min(width, 4), -(-width // 2**level)))
        for level in reversed(range(stages + 1))
    ]


class Generator(nn.Module):
    """Inputs (n, num_inputs) to images (n, channels, height, width) between 0 and 1: shares of the pixel range."""

    def __init__(self, image_shape: Sequence[int], num_inputs: int, num_channels: int):
        super().__init__()
        channels, height, width = image_shape
        self.grids, self.num_channels = grids(height, width), num_channels
        h, w = self.grids[0]
        self.linear = nn.Linear(num_inputs, num_channels * h * w)
        self.first = nn.BatchNorm2d(num_channels)
        widths = [num_channels] * (len(self.grids) - 1) + [max(1, num_channels // 2)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in zip([num_channels, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in widths)
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "n inputs"]) -> Float[Tensor, "n c h w"]:
        """Inputs to images."""
        x = self.first(self.linear(z).view(len(z), self.num_channels, *self.grids[0]))
        for size, convolution, norm in zip(self.grids, self.convolutions, self.norms, strict=True):
            if tuple(x.shape[2:]) != size:
                x = F.interpolate(x, size=size, mode="nearest")
            x = F.leaky_relu(norm(convolution(x)), SLOPE)
        return torch.sigmoid(self.last(x).float())


def draw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw new parameters in place: N(0, 0.02), around 1 for BatchNorm's scales; biases 0, statistics as new."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.reset_running_stats()
            for name, parameter in part.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                    continue
                noise = INIT_STD * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + 1 if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) else noise)


def unfilled(image_shape: Sequence[int], num_inputs: int, num_channels: int) -> Generator:
    """A generator in train mode on the CPU, for parameters to be put into; PyTorch's random state does not move."""
    with torch.random.fork_rng(devices=[]):
        return Generator(image_shape, num_inputs, num_channels).train()


def new(image_shape: Sequence[int], num_inputs: int, num_channels: int, seed: int) -> Generator:
    """A generator with parameters drawn from a seed, in train mode, on the CPU."""
    generator = unfilled(image_shape, num_inputs, num_channels)
    draw(generator, torch.Generator().manual_seed(seed))
    return generator


def restored(
    image_shape: Sequence[int], config: Any, arrays: Mapping[str, np.ndarray], device: torch.device
) -> Generator:
    """The generator in a state, in train mode; `config` has `num_inputs` and `num_channels`."""
    generator = unfilled(image_shape, config.num_inputs, config.num_channels)
    load(generator, arrays, device)
    return generator


def pixels(shares: Float[Tensor, "n c h w"], space: PixelSpace) -> Float[Tensor, "n c h w"]:
    """A generator's images as normalised pixels: 0 is the lowest pixel value and 1 the highest."""
    low, high = space.bounds(shares.device)
    return low + (high - low) * shares


def arrays_of(module: nn.Module, prefix: str = GENERATOR) -> Arrays:
    """The state of a module as arrays, under a prefix."""
    return {f"{prefix}{name}": tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}


def load(module: nn.Module, arrays: Mapping[str, np.ndarray], device: torch.device, prefix: str = GENERATOR) -> None:
    """Give a module the state that `arrays_of` has taken, and move it to a device."""
    state = {name: torch.from_numpy(np.array(arrays[f"{prefix}{name}"])) for name in module.state_dict()}
    module.load_state_dict(state)
    devices.place(module, device)


def adam_arrays(optimiser: torch.optim.Optimizer, module: nn.Module, prefix: str = ADAM) -> Arrays:
    """The moments and counters of an Adam over a module's parameters; those of a parameter without a step are 0."""
    arrays: Arrays = {}
    for name, parameter in module.named_parameters():
        held = optimiser.state.get(parameter, {})
        for what in ("exp_avg", "exp_avg_sq"):
            tensor = held.get(what, torch.zeros_like(parameter))
            arrays[f"{prefix}{what}.{name}"] = tensor.detach().cpu().numpy().copy()
        arrays[f"{prefix}step.{name}"] = np.asarray(float(held.get("step", 0.0)), np.float32)
    return arrays


def put_adam(
    optimiser: torch.optim.Optimizer, module: nn.Module, arrays: Mapping[str, np.ndarray], prefix: str = ADAM
) -> None:
    """Give an Adam over a module's parameters the moments that `adam_arrays` has taken."""
    for name, parameter in module.named_parameters():
        step = float(arrays[f"{prefix}step.{name}"])
        if step:
            held = optimiser.state[parameter]
            held["step"] = torch.tensor(step)
            for what in ("exp_avg", "exp_avg_sq"):
                moment = torch.from_numpy(np.array(arrays[f"{prefix}{what}.{name}"]))
                held[what] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(moment)


def mean_of(contributions: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]) -> Arrays:
    """The means of a round's contributions, each in its own type: `batches` says how many there are.

    Batches that train a generator in parallel are averaged, weights and moments alike. Source of averaging after local
    steps: Stich 2019, arXiv 1805.09767.
    """
    count = float(contributions["batches"])
    return {name: (np.asarray(contributions[name]) / count).astype(array.dtype) for name, array in like.items()}


def finite(contribution: Arrays) -> Arrays:
    """A batch's contribution, counted. `FloatingPointError` if a value is not finite: it would spoil every later round.

    The loss may be finite where its gradient is not.
    """
    for name, array in contribution.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"synthesis: {name} is not finite after the last step; lower learning_rate")
    return {**contribution, "batches": np.asarray(1.0)}
