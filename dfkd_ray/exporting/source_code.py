"""A network as Python source that needs PyTorch and safetensors alone, from a trace by `torch.fx`.

PyTorch's own layers become constructors, under the names that they have in the network; what happens between them
becomes lines of `forward`. What a trace does not hold (a branch on the values or the sizes of images, a function that
is not PyTorch's) is refused. The text around them is in `source_page`.
"""

import builtins
import inspect
import keyword
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jaxtyping
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from dfkd_ray.exporting.code_layout import Call, Code, call, flat, laid_out, literal, sequence, text
from dfkd_ray.text import one_line
from dfkd_ray.untrusted import reason

ROOT = "network"  # the network's name in the module that is traced
SAYS = "the network cannot be written as source code"
INSTEAD = "take format onnx or torch-export, which follow a run of it"
NAMES = "xyzuvw"  # of variables in `forward`; then numbered ones
INDENT = 8  # of a line of `forward`
BINARY: dict[Any, str] = {
    **{operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//"},
    **{operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.and_: "&", operator.or_: "|"},
    **{operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!="},
}
IN_PLACE: dict[Any, str] = {operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/="}
LOOKS = {*BINARY, builtins.getattr, operator.getitem, "size", "dim"}  # what only looks at a value
SPACES = ((torch, "torch"), (F, "F"), (torch.linalg, "torch.linalg"), (torch.special, "torch.special"))


@dataclass
class Source:
    """A network as code: constructors of layers by path, shapes of bare tensors by path, lines of `forward`, weights.

    Paths have dots, as in a state dict.
    """

    layers: dict[str, Code] = field(default_factory=dict)
    tensors: dict[str, Code] = field(default_factory=dict)
    forward: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Tracer(fx.Tracer):
    """Enters every module but PyTorch's own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is written as its constructor. Hooks run only where their module is entered."""
        own = type(m).__module__.startswith("torch.nn.modules.") and getattr(nn, type(m).__name__, None) is type(m)
        hooked = m._forward_hooks or m._forward_pre_hooks
        return own and not hooked and not isinstance(m, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def source(whole: nn.Module) -> Source:
    """The code of the network in `whole.network`, whose forward is `whole`'s. `ValueError` if it cannot be written."""
    try:
        with untyped():
            graph = Tracer().trace(whole)
    except Exception as error:
        raise ValueError(f"{SAYS}: torch.fx says {reason(error, 160)}; {INSTEAD}") from error
    made, values = Source(), {}
    nodes = needed(graph)
    names = variables(nodes)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = "images"
        elif node.op == "get_attr":
            values[node] = add_tensor(made, whole, str(node.target))
        elif node.op == "output":
            made.forward.append(laid_out("return ", rendered(node.args[0], values), INDENT))
        elif node in names:
            made.forward += lines(made, whole, node, names[node], values)
            values[node] = names[node]
    for path in [path for path in made.tensors if path.rpartition(".")[0] in made.layers]:
        del made.tensors[path]  # its layer has it
    return made


@contextmanager
def untyped() -> Iterator[None]:
    """Without jaxtyping's checks, which refuse a tracer's stand-ins for tensors."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def needed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that become lines, in order: without assertions of shapes, and what is computed for them alone."""
    wanted = [node for node in graph.nodes if node.op in ("call_module", "call_function", "call_method")]
    kept = dict.fromkeys(node for node in graph.nodes if node.target is not torch._assert)
    for node in reversed(wanted):
        if node in kept and node.target in LOOKS and not any(user in kept for user in node.users):
            del kept[node]
    return [node for node in wanted if node in kept]


def variables(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """A name for each value: that of the first operand if it ends there, else the first that is free."""
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    for node in nodes:
        if any(user.op == "output" for user in node.users):
            last[node] = None  # type: ignore[assignment]
    names: dict[fx.Node, str] = {}
    used: set[str] = set()
    for node in nodes:
        ended = [names[each] for each in node.all_input_nodes if each in names and last.get(each) is node]
        used -= set(ended)
        pool = (NAMES[i] if i < len(NAMES) else f"x{i - len(NAMES) + 1}" for i in range(len(nodes) + len(NAMES)))
        names[node] = ended[0] if ended else next(name for name in pool if name not in used)
        if node in last:
            used.add(names[node])
    return names


def lines(made: Source, whole: nn.Module, node: fx.Node, name: str, values: Mapping[fx.Node, Code]) -> list[str]:
    """The statements that give a node's value its name."""
    if node.op == "call_function" and node.target in IN_PLACE:
        first, second = (rendered(operand, values) for operand in node.args)
        changed = laid_out(f"{flat(first)} {IN_PLACE[node.target]} ", second, INDENT)
        return [changed] if first == name else [changed, laid_out(f"{name} = ", first, INDENT)]
    return [laid_out(f"{name} = ", expression(made, whole, node, values), INDENT)]


def expression(made: Source, whole: nn.Module, node: fx.Node, values: Mapping[fx.Node, Code]) -> Code:
    """A node's value as code; layers that it calls are added to `made`."""
    target = node.target
    positional = [rendered(each, values) for each in node.args]
    given = without_defaults(target, node.kwargs) if node.op == "call_function" else node.kwargs
    named = {name: rendered(each, values) for name, each in given.items()}
    if node.op == "call_module":
        return call(add_layer(made, whole, str(target)), positional, named)
    if node.op == "call_method":
        return call(f"{flat(positional[0])}.{target}", positional[1:], named)
    if target in BINARY:
        first, second = (f"({each})" if each.startswith("-") else each for each in map(flat, positional))
        return f"{first} {BINARY[target]} {second}"
    if target is operator.neg:
        return f"-{flat(positional[0])}"
    if target is operator.getitem:
        index = node.args[1]
        places = index if isinstance(index, tuple) and index else (index,)
        return f"{flat(positional[0])}[{', '.join(place(each, values) for each in places)}]"
    if target is builtins.getattr and len(node.args) == 2 and str(node.args[1]).isidentifier():
        return f"{flat(positional[0])}.{node.args[1]}"
    return call(function_name(target, node), positional, named)


def place(index: Any, values: Mapping[fx.Node, Code]) -> str:
    """One index in square brackets; a slice as `::2`."""
    if not isinstance(index, slice):
        return flat(rendered(index, values))
    ends = ["" if each is None else flat(rendered(each, values)) for each in (index.start, index.stop, index.step)]
    return ":".join(ends) if ends[2] else ":".join(ends[:2])


def without_defaults(function: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments that are not the function's defaults, as far as it tells them."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function in C
        return dict(named)
    return {name: value for name, value in named.items() if not (name in known and is_same(value, known[name].default))}


def is_same(value: Any, default: Any) -> bool:
    """Whether a plain value equals a default, of the same type."""
    return type(value) is type(default) and not isinstance(value, fx.Node) and value == default


def function_name(function: Any, node: fx.Node) -> str:
    """A function of PyTorch as code. `ValueError` for another one, with the module that a node calls it in."""
    for space, prefix in SPACES:
        name = getattr(function, "__name__", "")
        if getattr(space, name, None) is function:
            return f"{prefix}.{name}"
        for name, value in vars(space).items():
            if value is function and name.isidentifier():
                return f"{prefix}.{name}"
    name = one_line(getattr(function, "__name__", function), 60)
    raise ValueError(f"{SAYS}: {module_of(node)} calls {name}, which is not PyTorch's; {INSTEAD}")


def module_of(node: fx.Node) -> str:
    """The innermost module whose code a node of a traced network is from, by its path in the network and its class."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    inner = str(path).removeprefix(ROOT).lstrip(".")
    return f"{one_line(inner, 80) or 'the network'} ({one_line(kind.rpartition('.')[2], 40)})"


def rendered(value: Any, values: Mapping[fx.Node, Code]) -> Code:
    """An operand as code. `ValueError` for what has no literal."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, tuple | list):
        return sequence([rendered(each, values) for each in value], isinstance(value, tuple))
    if isinstance(value, dict):
        parts = [(f"{flat(rendered(name, values))}: ", rendered(each, values)) for name, each in value.items()]
        return Call("{", parts, "}")
    if isinstance(value, slice):
        return call("slice", [rendered(each, values) for each in (value.start, value.stop, value.step)], {})
    code = literal(value)
    if code is None:
        raise ValueError(f"{SAYS}: a {type(value).__name__} is handed to a function in it")
    return code


def own_path(target: str) -> str:
    """A path in the traced module as one in the network."""
    return target.removeprefix(f"{ROOT}.")


def access(path: str) -> str:
    """Code that gives the part at a path: `self.layer1[0].conv1`."""
    code = "self"
    for name in path.split("."):
        if is_name(name):
            code += f".{name}"
        else:
            code = f"{code}[{name}]" if is_number(name) else f"getattr({code}, {text(name)})"
    return code


def is_name(name: str) -> bool:
    """Whether a name can be written as an attribute. Python changes those that begin with two underscores."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def is_number(name: str) -> bool:
    """Whether a name is a number, as those of the parts of a list."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def add_layer(made: Source, whole: nn.Module, target: str) -> str:
    """Add a layer's constructor and weights; returns code that gives the layer."""
    path, layer = own_path(target), whole.get_submodule(target)
    if path not in made.layers:
        made.layers[path] = constructor(layer, path)
        made.weights |= {f"{path}.{name}": tensor for name, tensor in layer.state_dict().items()}
    return access(path)


def add_tensor(made: Source, whole: nn.Module, target: str) -> str:
    """Add a parameter or a buffer that is used outside of a layer; returns code that gives it."""
    parent, _, name = target.rpartition(".")
    value, path = getattr(whole.get_submodule(parent), name), own_path(target)
    if not isinstance(value, Tensor):
        raise ValueError(f"{SAYS}: {one_line(path, 60)} in it is a {type(value).__name__}")
    shape = [str(side) for side in value.shape]
    dtype = {} if value.dtype == torch.float32 else {"dtype": literal(value.dtype) or ""}
    empty = call("torch.empty", [sequence(shape, True)] if len(shape) != 1 else shape, dtype)
    made.tensors[path] = call("nn.Parameter", [empty], {}) if isinstance(value, nn.Parameter) else empty
    made.weights[path] = value.detach()
    return access(path)


def constructor(layer: nn.Module, path: str) -> Code:
    """The call that makes one of PyTorch's layers, from its attributes: those that differ from the defaults.

    `ValueError` if the layer does not keep what it was made with.
    """
    kind = type(layer).__name__
    positional: list[Code] = []
    named: dict[str, Code] = {}
    takes_none = type(layer).__init__ is nn.Module.__init__ or isinstance(layer, nn.Identity)
    taken = {} if takes_none else inspect.signature(type(layer)).parameters
    for name, parameter in taken.items():
        if name in ("device", "dtype"):
            continue
        value, default = getattr(layer, name, parameter.default), parameter.default
        if name == "bias" and isinstance(value, Tensor | None):
            value = value is not None
        if isinstance(layer, _ConvNd) and isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value is inspect.Parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"{SAYS}: {one_line(path, 60)} is an nn.{kind}, which does not keep its arguments; {INSTEAD}"
            )
        if default is inspect.Parameter.empty and len(positional) < 2 and not named:
            positional.append(rendered(value, {}))
        elif not is_same(value, default):
            named[name] = rendered(value, {})
    return call(f"nn.{kind}", positional, named)
