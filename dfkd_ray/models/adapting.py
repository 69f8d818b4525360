"""Adapts a network from elsewhere, so that all other modules see one that gives logits, in float32, and can be copied.

A network is run a few times on two random images when it is built. What it needs is attached to it and survives copies:
a forward hook that takes the logits out of its output, and the memory format that it takes. Weights that are computed
from other tensors (weight norm, spectral norm, any parametrization, masks of `torch.nn.utils.prune`) become plain
parameters. Everything that was changed is said in `notes`. A network that cannot be adapted raises `ValueError`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dfkd_ray.devices import CONTIGUOUS
from dfkd_ray.models.checks import guarded, is_logits, logits_of, not_logits, shown, taken_out_of
from dfkd_ray.text import one_line

NOTES, ENDS_IN = "dfkd_ray_notes", "dfkd_ray_ends_in"  # attributes of an adapted network
COMPUTED = (WeightNorm, SpectralNorm, BasePruningMethod)  # hooks that compute a weight before each forward pass
TINY = 1e-30  # the smallest probability whose logarithm is taken
SHAPING = ("View", "Reshape", "Squeeze", "Unsqueeze", "UnsafeView", "Alias", "ToCopy", "Clone", "Slice", "Select")


def notes(network: nn.Module) -> tuple[str, ...]:
    """What was changed in a network to adapt it, a sentence each."""
    return getattr(network, NOTES, ())


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's and DataParallel's wrappers."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        is_compiled = type(network).__module__.startswith("torch._dynamo")  # a user's own may have an `_orig_mod` too
        if not (isinstance(network, kinds) or is_compiled):
            return network
        network = network._orig_mod if is_compiled else network.module  # type: ignore[assignment]


def copied(network: nn.Module) -> nn.Module:
    """A deep copy. Weights that hooks compute are detached first: PyTorch copies no tensor that has a history."""
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            "the network is TorchScript, whose layers cannot be changed; load its state_dict() into the nn.Module that "
            "it was made from, and hand that in"
        )
    if has_lazy(network):
        raise ValueError("the network has lazy layers without weights; run it once on an image before you hand it in")
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())
    with guarded("the network cannot be copied"):
        return deepcopy(network)


@torch.no_grad()
def bake(network: nn.Module) -> None:
    """Make computed weights plain parameters, in place. The network gives the same outputs as before in eval mode."""
    found = []
    for path, module in list(network.named_modules()):
        if parametrize.is_parametrized(module):
            # The class holds the weight's property, which is removed; copies have it in common with the original.
            kind_of = type(module)
            own: Any = type(kind_of.__name__, kind_of.__bases__, dict(vars(kind_of)))
            module.__class__ = own
            computed: Any = module.parametrizations
            for name in list(computed):
                of_parameters = any(True for _ in computed[name].parameters(recurse=False))
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                value = getattr(module, name)
                if of_parameters and not isinstance(value, nn.Parameter):  # PyTorch's way with frozen weight_norm
                    delattr(module, name)
                    setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))
                found.append(f"{path}.{name}".lstrip("."))
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, COMPUTED):
                found.append(f"{path}.{getattr(hook, 'name', None) or getattr(hook, '_tensor_name', '')}".lstrip("."))
                hook.remove(module)  # type: ignore[arg-type]
                del module._forward_pre_hooks[key]
                remove_state_hooks(module, hook)
    if found:
        add_note(network, f"computed weights are stored as plain ones: {one_line(', '.join(found), 120)}")


def remove_state_hooks(module: nn.Module, of: Any) -> None:
    """Remove the hooks by which PyTorch's old spectral norm saves and loads: they ask for tensors that are gone.

    PyTorch's own removal leaves the second one, which is wrapped.
    """
    hooks: tuple[dict[int, Any], ...] = (module._state_dict_hooks, module._load_state_dict_pre_hooks)
    for registered in hooks:
        for key, hook in list(registered.items()):
            if getattr(getattr(hook, "hook", hook), "fn", None) is of:
                del registered[key]


def add_note(network: nn.Module, note: str) -> None:
    """Add one sentence to a network's notes."""
    setattr(network, NOTES, (*notes(network), note))


def adapt(network: nn.Module, architecture: str, num_classes: int, image_shape: Sequence[int]) -> None:
    """Adapt a network in eval mode on the CPU, in place. `ValueError` with the reason if that is not possible."""
    images = random_images(image_shape)
    says = f"{shown(architecture)} does not take two images of {'x'.join(map(str, image_shape))}"
    with quiet_generator(), torch.no_grad():
        given = images.clone()
        with guarded(says):
            answer = network(given)
        if not torch.equal(given, images):
            network.register_forward_pre_hook(copy_images)
            add_note(network, "it changes the images that it is given: it is given a copy")
        with guarded(f"{says} in train mode"):
            trained_answer = copied(network).train()(images)
        for mode, given in (("eval", answer), ("train", trained_answer)):
            if logits_of(given, num_classes, 2) is None:
                raise ValueError(f"{shown(architecture)} in {mode} mode gives {not_logits(given, num_classes, 2)}")
        again = logits_of(network(images), num_classes, 2)
    logits = logits_of(answer, num_classes, 2)
    assert logits is not None
    if again is None or not torch.equal(logits.nan_to_num(), again.nan_to_num()):
        raise ValueError(
            f"{shown(architecture)} gives other logits for the same images from pass to pass in eval mode (F.dropout "
            "without training=self.training, an observer of quantisation?): nothing can be compared with it"
        )
    both = (given for given in (answer, trained_answer) if not is_logits(given, num_classes, 2))
    others = dict.fromkeys(taken_out_of(given, num_classes, 2) for given in both)
    if others:
        add_note(network, f"its logits are taken out of {' and '.join(others)}; the rest is not used")
        network.register_forward_hook(partial(take_logits, num_classes=num_classes))
    check_copy(network, architecture, images)
    ends_in = last_function(network, images)
    of_training = last_function(copied(network).train(), images)
    if ends_in is not None or of_training is not None:
        modes = "" if ends_in == of_training else f" in {'eval' if of_training is None else 'train'} mode"
        add_note(
            network, f"it ends in a {ends_in or of_training}{modes}, which is undone: the outputs are logits again"
        )
        network.register_forward_hook(partial(undo, ends_in=ends_in, of_training=of_training))
        setattr(network, ENDS_IN, ends_in or of_training)
    if writes_out_of_bounds(network):
        setattr(network, CONTIGUOUS, True)
    elif images.ndim == 4:
        try:
            turned = copied(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with torch.no_grad(), quiet_generator():
                turned(images.contiguous(memory_format=torch.channels_last))
        except (Exception, SystemExit):  # noqa: BLE001 - often `view` on a convolution's output, or a Conv3d's weights
            setattr(network, CONTIGUOUS, True)


def writes_out_of_bounds(network: nn.Module) -> bool:
    """Whether a strided 1x1 convolution sees few channels, as in RepVGG and MobileOne.

    On a CPU, PyTorch 2.14 writes out of bounds in its gradient, if it runs in channels last with 3 or 4 channels.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return any(one.in_channels < 8 and set(one.kernel_size) == {1} and max(one.stride) > 1 for one in layers)


def random_images(image_shape: Sequence[int], num_images: int = 2) -> Tensor:
    """Normal noise: the same for each network of these images."""
    return torch.randn(num_images, *image_shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def quiet_generator() -> Iterator[None]:
    """Restore the global generator, from which dropout draws."""
    with torch.random.fork_rng(devices=[]):
        yield


def as_signals(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: images of height 1 (n, channels, 1, length) as signals (n, channels, length)."""
    return tuple(x.squeeze(2) if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == 1 else x for x in given)


def copy_images(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: copies of the images, for a network that changes them in place."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in given)


def take_logits(_module: nn.Module, _given: Any, answer: Any, *, num_classes: int) -> Tensor:
    """A forward hook: the logits in an output of several parts."""
    logits = logits_of(answer, num_classes)
    if logits is None:
        raise ValueError(f"the network gives {not_logits(answer, num_classes)}")
    return logits


def undo(
    module: nn.Module, _given: Any, answer: Tensor, *, ends_in: str | None, of_training: str | None
) -> Tensor | None:
    """A forward hook that undoes the last function of a network, which may be another one in train mode.

    Of a softmax: logarithms, whose softmax are the probabilities again; of a sigmoid: log odds.
    """
    last, p = of_training if module.training else ends_in, answer.float()
    if last is None:
        return None
    return p.clamp_min(TINY).log() - (0 if last == "softmax" else (1 - p).clamp_min(TINY).log())


def ends_in(network: nn.Module) -> str | None:
    """ "softmax" or "sigmoid" if a network gives probabilities, which are turned into logits; else None."""
    return getattr(network, ENDS_IN, None)


def last_function(network: nn.Module, images: Tensor) -> str | None:
    """ "softmax" or "sigmoid" if a network gives probabilities, else None.

    Rows of probabilities sum to 1. Small logits may lie between 0 and 1 too, so a sigmoid is looked for in the graph.
    """
    with quiet_generator():
        outputs: Tensor = network(images.clone().requires_grad_(True))
    values = outputs.detach().double()
    if not bool(((values >= 0) & (values <= 1)).all()):
        return None
    if bool(((values.sum(dim=1) - 1).abs() < 1e-3).all()):
        return "softmax"
    node = outputs.grad_fn
    while node is not None and node.name().startswith(SHAPING):
        node = node.next_functions[0][0]
    return "sigmoid" if node is not None and "sigmoid" in node.name().lower() else None


def check_copy(network: nn.Module, architecture: str, images: Tensor) -> None:
    """`ValueError` if a copy still uses the original's weights, or if no gradient reaches weights and images."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    if not flags:
        return
    twin = copied(network).requires_grad_(False)
    try:
        network.requires_grad_(True)
        with quiet_generator(), guarded(f"{shown(architecture)} cannot be copied"):
            bound = twin(images).requires_grad
        network.requires_grad_(False)
        with quiet_generator(), guarded(f"{shown(architecture)} cannot be trained"):
            of_images = has_gradient(twin, images.clone().requires_grad_(True))
            twin.requires_grad_(True)
            of_weights = has_gradient(twin, images) and has_gradient(twin.train(), images)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if bound:
        raise ValueError(
            f"{shown(architecture)}: a copy of it still computes with the original's weights (a forward that is a "
            "closure or a bound method of another object?); define forward in the module's class"
        )
    if not (of_weights and of_images):
        what = "its weights" if of_images else "its images"
        raise ValueError(
            f"{shown(architecture)}: its output has no gradient with respect to {what} (no_grad or detach in forward?)"
        )


def has_gradient(network: nn.Module, images: Tensor) -> bool:
    """Whether a network's output has a gradient, which is computed (an operation in place may make that fail)."""
    outputs = network(images)
    if outputs.requires_grad:
        wanted = [images] if images.requires_grad else list(network.parameters())
        torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
    return outputs.requires_grad


def initialise_lazy(network: nn.Module, image_shape: Sequence[int]) -> None:
    """Give lazy layers their weights: their state dict has no shapes before."""
    if has_lazy(network):
        with torch.no_grad(), quiet_generator():
            network(random_images(image_shape))


def to_float32(network: nn.Module) -> None:
    """Make all weights float32, in place."""
    others = {p.dtype for p in network.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if others:
        network.float()
        add_note(network, f"weights of {', '.join(sorted(map(str, others)))} became float32")


def has_lazy(network: nn.Module) -> bool:
    """Whether a layer gets its weights in its first forward pass only."""
    return any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers()))
