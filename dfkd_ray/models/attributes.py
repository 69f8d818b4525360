"""The plain attributes of modules as text: what a `forward` may go by beside weights, such as a scale or a mode."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

ADDRESS = " at 0x"  # in the text of an object that says nothing of its content


def text_of(network: nn.Module) -> str:
    """A line for each public attribute of each module that is no module, parameter or buffer."""
    lines = []
    for path, module in network.named_modules():
        own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        lines += [f"{path}.{name}={plain(own[name])}" for name in sorted(own)]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value as text that is the same in every process; that of an object without content of its own is its type."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(plain, value))) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(plain, value)) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{plain(key)}: {plain(item)}" for key, item in value.items()) + "}"
    code = getattr(value, "__code__", None)
    if code is not None:  # a function, perhaps a lambda
        constants = [each for each in code.co_consts if isinstance(each, int | float | str | bool | None)]
        return f"{value.__module__}.{value.__qualname__} {code.co_code.hex()} {constants} {code.co_names}"
    text = repr(value)
    return text if ADDRESS not in text else f"{type(value).__module__}.{type(value).__qualname__}"
