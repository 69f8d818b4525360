"""Layers as matrix-free linear operators, and the graph of a whole network built from them.

A convolution as an explicit matrix is huge (AlexNet conv1: 193,600 x 150,528). Products with it and its transpose are
one convolution and one transposed convolution of a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

MATRIX_CHUNK = 512  # columns of an explicit matrix made at a time


@dataclass(frozen=True)
class Operator:
    """A linear map A: `forward` takes (k, *in_shape) to (k, *out_shape), `adjoint` back; both in precision `dtype`."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]

    @property
    def num_inputs(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.in_shape)

    @property
    def num_outputs(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.out_shape)

    def rows_forward(self, x: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        """x A^T: A applied to each row, inputs and outputs flattened."""
        return self.forward(x.reshape(-1, *self.in_shape)).reshape(len(x), -1)

    def rows_adjoint(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k n"]:
        """y A: A^T applied to each row, inputs and outputs flattened."""
        return self.adjoint(y.reshape(-1, *self.out_shape)).reshape(len(y), -1)

    def matrix(self) -> Float[Tensor, "m n"]:
        """A itself, for small operators and tests."""
        result = torch.empty(self.num_outputs, self.num_inputs, dtype=self.dtype)
        for start in range(0, self.num_inputs, MATRIX_CHUNK):
            stop = min(start + MATRIX_CHUNK, self.num_inputs)
            identity = torch.zeros(stop - start, self.num_inputs, dtype=self.dtype)
            identity[:, start:stop].fill_diagonal_(1)
            result[:, start:stop] = self.rows_forward(identity).T
        return result


def layer_operator(layer: nn.Module, in_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Operator:
    """A Linear, Conv1d or Conv2d (zero padding) without its bias, on inputs of `in_shape` (no batch axis)."""
    shape = tuple(in_shape)
    if isinstance(layer, nn.Linear):
        weight = layer.weight.detach().to(dtype)
        if shape != (layer.in_features,):
            raise ValueError(f"a Linear layer of {layer.in_features} features cannot take inputs of shape {shape}")
        return Operator(shape, (layer.out_features,), dtype, lambda x: x @ weight.T, lambda y: y @ weight)
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer, shape, dtype)
    if isinstance(layer, nn.Conv1d) and len(shape) == 2:
        flat = _convolution(_of_images(layer), (shape[0], 1, shape[1]), dtype)
        return Operator(
            shape,
            (flat.out_shape[0], flat.out_shape[2]),
            dtype,
            lambda x: flat.forward(x.unsqueeze(2)).squeeze(2),
            lambda y: flat.adjoint(y.unsqueeze(2)).squeeze(2),
        )
    raise ValueError(
        f"a {type(layer).__name__} has no spectral basis: expected Linear, Conv1d or Conv2d; record others by their "
        "statistics"
    )


def _of_images(layer: nn.Conv1d) -> nn.Conv2d:
    """The convolution of images of height 1 that computes what a convolution of signals does."""
    of: Any = layer
    padding = of.padding if isinstance(of.padding, str) else (0, *of.padding)
    sides = {"stride": (1, *of.stride), "dilation": (1, *of.dilation), "padding": padding}
    mode = of.padding_mode
    made = nn.Conv2d(
        of.in_channels, of.out_channels, (1, *of.kernel_size), groups=of.groups, padding_mode=mode, **sides
    )
    made.weight = nn.Parameter(of.weight.detach().unsqueeze(2), requires_grad=False)
    return made


def _convolution(layer: nn.Conv2d, in_shape: tuple[int, ...], dtype: torch.dtype) -> Operator:
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"a convolution with padding_mode={layer.padding_mode!r} has no spectral basis here: expected 'zeros'; "
            "record it by its statistics"
        )
    if len(in_shape) != 3 or in_shape[0] != layer.in_channels:
        raise ValueError(
            f"a convolution of {layer.in_channels} channels cannot take inputs of shape {in_shape}: expected "
            "(channels, height, width)"
        )
    weight = layer.weight.detach().to(dtype)
    channels, height, width = in_shape
    padding, (bottom, right) = _paddings(layer)
    padded = (channels, height + bottom, width + right)
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups

    def forward(x: Tensor) -> Tensor:
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    def adjoint(y: Tensor) -> Tensor:
        # Exactly the gradient that autograd would take: right for any stride, padding, dilation and groups.
        size = (len(y), *padded)
        x = conv2d_input(size, weight, y, stride, padding, dilation, groups)  # type: ignore[arg-type]  # takes pairs too
        return x[:, :, :height, :width]

    out_shape = tuple(forward(torch.zeros(1, *in_shape, dtype=dtype)).shape[1:])
    return Operator(in_shape, out_shape, dtype, forward, adjoint)


def _paddings(layer: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zero padding on all sides (rows, columns), and the additional zeros of 'same' below and to the right."""
    if layer.padding == "same":
        totals = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple(total // 2 for total in totals), tuple(total % 2 for total in totals)
    if isinstance(layer.padding, str):
        return (0, 0), (0, 0)
    return tuple(layer.padding), (0, 0)


def resampler(in_shape: tuple[int, ...], out_shape: tuple[int, ...], dtype: torch.dtype) -> Operator:
    """From one layer's output to the next layer's input: adaptive average pooling, then flattening.

    It is the identity if the shapes are equal. A flat input of f features after c channels is pooled to c x h x w with
    h w = f / c and the output's aspect ratio. Max-pooling is not linear; average pooling replaces it.
    """
    image_in, image_out = ((s[0], 1, s[1]) if len(s) == 2 else s for s in (in_shape, out_shape))  # signals
    grid = _pooled_grid(image_in, image_out)

    def forward(x: Tensor) -> Tensor:
        if grid is not None:
            x = F.adaptive_avg_pool2d(x.reshape(len(x), *image_in), grid)
        return x.reshape(len(x), *out_shape)

    def adjoint(y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros(len(y), *in_shape, dtype=dtype, requires_grad=True)
            return torch.autograd.grad(forward(x), x, y)[0]

    return Operator(in_shape, out_shape, dtype, forward, adjoint)


def _pooled_grid(in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width to pool to; None if flattening is enough."""
    if math.prod(in_shape) == math.prod(out_shape) and (in_shape == out_shape or 1 in (len(in_shape), len(out_shape))):
        return None
    if len(in_shape) == 3:
        channels, height, width = in_shape
        if len(out_shape) == 3 and out_shape[0] == channels:
            return out_shape[1], out_shape[2]
        if len(out_shape) == 1 and out_shape[0] % channels == 0:
            cells = out_shape[0] // channels
            rows = 1 if height == 1 else round(math.sqrt(cells * height / width))
            if rows >= 1 and cells % rows == 0:
                return rows, cells // rows
    raise ValueError(
        f"activations of shape {in_shape} do not lead to inputs of shape {out_shape}: expected the same shape, the "
        "same channels on another grid, or their flattening. A whole-network graph needs a chain of layers; record "
        "layer pairs for other networks"
    )


def _composed(resample: Operator, operator: Operator) -> Operator:
    """operator after resample."""
    return Operator(
        resample.in_shape,
        operator.out_shape,
        operator.dtype,
        lambda x: operator.forward(resample.forward(x)),
        lambda y: resample.adjoint(operator.adjoint(y)),
    )


@dataclass(frozen=True)
class Graph:
    """The weighted graph of a chain of layers, over the units of their outputs in order.

    Only units of neighbouring layers are connected. So the graph is bipartite, with layers 1, 3, 5, ... on one side and
    2, 4, 6, ... on the other. Its adjacency is [[0, A^T], [A, 0]] with A (`halves`) from the first side to the second.
    """

    num_units: int
    odd: Bool[Tensor, " units"]  # True for units of layers 1, 3, 5, ...
    halves: Operator


def chain_graph(operators: Sequence[Operator], shapes: Sequence[tuple[int, ...]]) -> Graph:
    """The graph of layers with outputs of `shapes`; `operators` are those of layers 2, 3, ..., without biases.

    Block (l + 1, l) of the adjacency is operator l + 1 after resampling layer l's output to its input.
    """
    if len(shapes) != len(operators) + 1 or not operators:
        raise ValueError(
            f"a graph of {len(shapes)} layers needs an operator for each but the first and at least 2 layers, "
            f"got {len(operators)} operators"
        )
    for operator, shape in zip(operators, shapes[1:], strict=True):
        if operator.out_shape != tuple(shape):
            raise ValueError(f"an operator has outputs of shape {operator.out_shape}, its layer of {tuple(shape)}")
    dtype = operators[0].dtype
    blocks = [
        _composed(resampler(tuple(shape), operator.in_shape, dtype), operator)
        for shape, operator in zip(shapes, operators, strict=False)
    ]
    sizes = [math.prod(shape) for shape in shapes]
    return Graph(sum(sizes), _odd_layers(sizes), _halves(blocks, sizes, dtype))


def _odd_layers(sizes: list[int]) -> Tensor:
    return torch.cat([torch.full((size,), index % 2 == 0) for index, size in enumerate(sizes)])


def _halves(blocks: list[Operator], sizes: list[int], dtype: torch.dtype) -> Operator:
    """From the units of layers 1, 3, 5, ... to those of layers 2, 4, 6, ..."""

    def across(x: Tensor, given: int) -> Tensor:
        """Signals on one side (0: layers 1, 3, ...; 1: layers 2, 4, ...) taken along every edge to the other."""
        inputs = dict(zip(range(given, len(sizes), 2), x.split(sizes[given::2], dim=1), strict=True))
        outputs = []
        for index in range(1 - given, len(sizes), 2):
            parts = []
            if index - 1 in inputs:
                parts.append(blocks[index - 1].rows_forward(inputs[index - 1]))
            if index + 1 in inputs:
                parts.append(blocks[index].rows_adjoint(inputs[index + 1]))
            outputs.append(sum(parts[1:], start=parts[0]))
        return torch.cat(outputs, dim=1)

    in_shape, out_shape = (sum(sizes[::2]),), (sum(sizes[1::2]),)
    return Operator(in_shape, out_shape, dtype, lambda x: across(x, 0), lambda y: across(y, 1))
