"""An int8 file as a differentiable PyTorch network: fake quantisation at the places where the file quantises.

The network's exported program is run node by node. Weights of convolution and linear layers are rounded per output
channel to int8, symmetric, with their own largest value; values inside are rounded to uint8 per tensor, with the scales
and zero points of the file. Rounding passes gradients on unchanged within the range (straight-through estimator).
Source: Jacob et al. 2018, arXiv 1712.05877, section 3. BatchNorm stays as it is: it scales output channels, and a
symmetric step per output channel scales with it.

The file and the program name their values differently. A place is found by what is computed there: the node whose value
equals, on a few images, the value that the float32 file has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dfkd_ray.exporting import onnx_files, torch_files
from dfkd_ray.exporting.metadata import INPUT, OUTPUT

LAYERS = ("conv1d", "conv2d", "conv3d", "linear", "addmm")
MARK = "_QuantizeLinear_Input"  # what the quantiser appends to the name of an output
CLOSE = 1e-3  # of the spread of a value: what two programs may differ by
Step = tuple[float, int]  # scale, zero point


def simulation(
    network: nn.Module, input_shape: Sequence[int], float_model: bytes, int8_model: bytes, images: np.ndarray
) -> Callable[[Tensor], Tensor]:
    """A function from normalised images to the logits of the int8 model, differentiable in the network's parameters.

    `network`: in eval mode, on the CPU; its parameters are used as they are at each call. `images`: a few normalised
    images (n, *input_shape), n > 1. `ValueError` if a place is not found.
    """
    program = torch_files.program(network, input_shape)
    module = program.module()
    own, held = dict(module.named_parameters()), dict(network.named_parameters())
    for name, parameter in held.items():  # the program's parameters are the network's
        if own.get(f"network.{name}") is not parameter:
            raise ValueError("the exported program does not share the network's parameters")
    steps = quantised_values(int8_model)
    wanted = values_of(float_model, list(steps), images)
    found = places(module, steps, wanted, torch.from_numpy(images))
    return Simulation(module, found).run


def quantised_values(int8_model: bytes) -> dict[str, Step]:
    """The values inside a model that it quantises, by their names in the float32 model: scale and zero point."""
    import onnx

    graph = onnx.load_model_from_string(int8_model).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, Step] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
            if scale.size != 1 or zero.dtype != np.uint8:
                raise ValueError(f"the int8 model quantises {node.input[0]} in another way than uint8 per tensor")
            found[node.input[0].removesuffix(MARK)] = (float(scale), int(zero))
    return found


def values_of(float_model: bytes, names: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Values inside a model on given images."""
    import onnx

    model = onnx.load_model_from_string(float_model)
    inside = {name for node in model.graph.node for name in node.output}
    missing = sorted(set(names) - inside - {INPUT})
    if missing:
        raise ValueError(f"the int8 model quantises {missing[0]}, which the float32 model does not have")
    tapped = [name for name in names if name not in (INPUT, OUTPUT)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tapped)
    session = onnx_files.session(model.SerializeToString(), spinning=False)
    given = [name for name in names if name != INPUT]
    found = dict(zip(given, session.run(given, {INPUT: images}), strict=True)) if given else {}
    return found | ({INPUT: images} if INPUT in names else {})


class Recorder(fx.Interpreter):
    """Runs a program and keeps the values of all its nodes, in order."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and n.op != "get_attr":
            self.values[n.name] = value.detach().clone()  # a later node may change it in place
        return value


class Simulation(fx.Interpreter):
    """Runs a program with fake quantisation."""

    def __init__(self, module: fx.GraphModule, places: dict[str, Step]):
        super().__init__(module)
        self.places = places

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, quantised where the file quantises it."""
        value = super().run_node(n)
        if n.name not in self.places:
            return value
        scale, zero = self.places[n.name]
        return torch.fake_quantize_per_tensor_affine(value, scale, zero, 0, 255)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Layers get quantised weights."""
        name = getattr(target, "__name__", "").partition(".")[0]
        if name in LAYERS:
            place = 2 if name == "addmm" else 1
            weight = args[place].t() if name == "addmm" else args[place]
            weight = rounded(weight)
            args = (*args[:place], weight.t() if name == "addmm" else weight, *args[place + 1 :])
        return super().call_function(target, args, kwargs)


def rounded(weight: Tensor) -> Tensor:
    """Weights (outputs, …) in 255 symmetric steps per output, with straight-through gradients."""
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = torch.where(largest > 0, largest, 1.0) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)


def places(
    module: fx.GraphModule, steps: dict[str, Step], wanted: dict[str, np.ndarray], images: Tensor
) -> dict[str, Step]:
    """The program's nodes with the values that a file quantises: name → its step. `ValueError` if one is missing."""
    recorder = Recorder(module)
    with torch.no_grad():
        recorder.run(images)
    found: dict[str, Step] = {}
    for name, step in steps.items():
        own = next((node for node, value in recorder.values.items() if is_close(value, wanted[name])), None)
        if own is None:
            raise ValueError(f"no part of the network computes what the int8 model quantises as {name}")
        found[own] = step
    return found


def is_close(value: Tensor, wanted: np.ndarray) -> bool:
    """Whether two values are equal to rounding."""
    if tuple(value.shape) != wanted.shape:
        return False
    return float(np.abs(value.numpy() - wanted).max()) <= CLOSE * float(wanted.std()) + 1e-6
