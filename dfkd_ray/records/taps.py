"""Finds the layers whose activations are recorded (linear and convolution, in execution order), and records them.

A layer's *values* are its outputs, before any nonlinearity; its *activation* is ReLU(values), for the last layer the
values themselves (logits). Logits are divided by the temperature, as in the paper (L / T, T = 8).
Source: Lopes, Fenu and Starner 2017, arXiv 1710.07535, section 3.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NUM_COMPARED, CLOSE = 2, 1e-2  # images on which the last layer is compared with the logits; of the largest logit


@dataclass(frozen=True)
class Tap:
    """One layer: its module path, and the shapes of one example's input and output."""

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """Units of the input."""
        return math.prod(self.in_shape)

    @property
    def num_units(self) -> int:
        """Units of the output."""
        return math.prod(self.out_shape)


@dataclass
class Values:
    """One forward pass: each layer's input and output, flattened to (examples, units)."""

    inputs: list[Tensor]
    outputs: list[Tensor]


def find(network: nn.Module, image_shape: Sequence[int]) -> list[Tap]:
    """The linear and convolution layers in the order of a forward pass.

    `ValueError` if there is none, if a layer runs twice, or if the last layer's output is not the logits.
    """
    order: list[Tap] = []
    last = torch.zeros(0)

    def hook(name: str):
        def seen(_module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> None:
            nonlocal last
            read, last = input_of(given, named), out.clone()  # a ReLU in place would change it
            order.append(Tap(name, tuple(read.shape[1:]), tuple(out.shape[1:])))

        return seen

    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, LAYERS)]
    hooks = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers]
    try:
        with torch.no_grad():
            device = next(network.parameters()).device
            images = torch.randn(NUM_COMPARED, *image_shape, generator=torch.Generator().manual_seed(0))
            logits = network(images.to(device))
    finally:
        for handle in hooks:
            handle.remove()
    names = [tap.name for tap in order]
    if not order:
        raise ValueError("activation records: the network has no linear or convolution layer")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(
            f"activation records: layer {twice} runs more than once in a forward pass; its values are not one set"
        )
    if not are_logits(last, logits):
        raise ValueError(f"activation records: the last layer that runs, {names[-1]}, does not give the logits")
    return order


def input_of(given: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """The input of a layer, whichever way it was called."""
    return given[0] if given else named["input"]


def are_logits(values: Tensor, logits: Tensor) -> bool:
    """Whether a layer's values are the logits. Those behind a softmax may differ by a number for each image.

    Values that are not finite cannot be compared; the pass over the data refuses them by their layer.
    """
    if values.shape != logits.shape or not (values.isfinite().all() and logits.isfinite().all()):
        return values.shape == logits.shape
    own, others = (each.float() - each.float().mean(1, keepdim=True) for each in (values, logits))
    return float((own - others).abs().max()) <= CLOSE * float(others.abs().max())


@contextmanager
def recorded(network: nn.Module, taps: Sequence[Tap]) -> Iterator[Values]:
    """Yields values that each forward pass replaces while open; they are differentiable."""
    values = Values([], [])
    first = taps[0].name

    def hook(name: str):
        def seen(_module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> None:
            if name == first:
                values.inputs.clear()
                values.outputs.clear()
            # Copies: what comes after the layer may work in place, as many a ReLU does.
            values.inputs.append(input_of(given, named).float().flatten(1).clone())
            values.outputs.append(out.float().flatten(1).clone())

        return seen

    modules = dict(network.named_modules())
    hooks = [modules[tap.name].register_forward_hook(hook(tap.name), with_kwargs=True) for tap in taps]
    try:
        yield values
    finally:
        for handle in hooks:
            handle.remove()


def scaled_outputs(values: Values, temperature: float) -> list[Tensor]:
    """Each layer's output, the last one's (the logits) divided by the temperature."""
    return [*values.outputs[:-1], values.outputs[-1] / temperature]


def signals(values: Values, temperature: float) -> list[Tensor]:
    """Each layer's activation: ReLU of its output, and logits / temperature for the last."""
    outputs = scaled_outputs(values, temperature)
    return [*(output.relu() for output in outputs[:-1]), outputs[-1]]


def basis_signals(kind: str, values: Values, temperature: float) -> list[Tensor]:
    """The signals of a spectral kind, one per basis, each (examples, units): see `format`."""
    activations = signals(values, temperature)
    if kind == "spectral":
        return [torch.cat(activations, dim=1)]
    pairs = activations[:1]
    for given, activation in zip(values.inputs[1:], activations[1:], strict=True):
        pairs += [given, activation]
    return pairs


def signal_names(kind: str, found: Sequence[Tap]) -> list[str]:
    """The names of the signals of a spectral kind, as in `basis_signals`."""
    if kind == "spectral":
        return ["network"]
    names = [f"{found[0].name}.activation"]
    for tap in found[1:]:
        names += [f"{tap.name}.input", f"{tap.name}.activation"]
    return names
