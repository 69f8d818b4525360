"""A student that starts from a file: the zeros that it keeps, and what a trial says of it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from dfkd_ray.bundles import Teacher, starts
from dfkd_ray.compression import pruning
from dfkd_ray.config import METHODS, TrialConfig
from dfkd_ray.text import one_line
from dfkd_ray.trial import structure


def zeros(student: nn.Module, config: TrialConfig) -> pruning.Masks:
    """The masks (True: not zero) of the layers in which a file's weights have zeros, if these are kept; else none."""
    if config.student.weights is None or not config.student.keep_zeros:
        return {}
    masks = {name: weight.detach() != 0 for name, weight in pruning.prunable(student).items()}
    return {name: mask for name, mask in masks.items() if not mask.all()}


def both(masks: pruning.Masks, kept: pruning.Masks) -> pruning.Masks:
    """Masks of the weights that neither of two drops."""
    return masks | {name: mask & masks[name] if name in masks else mask for name, mask in kept.items()}


def check(student: nn.Module, config: TrialConfig, teacher: Teacher) -> None:
    """`ValueError` for zeros that the config's pruning would not keep, or a method that does not take the student."""
    if config.student.weights is None:
        return
    if zeros(student, config):
        cubic = config.pruning.schedule == "cubic"
        if cubic or structure.applies(config):
            setting = "schedule=cubic" if cubic else "structure=channels"
            raise ValueError(
                f"pruning.{setting} would not keep the zeros of student.weights; set student.keep_zeros=false, or "
                "another one"
            )
    if not METHODS[config.synthesis.method].is_stationary and starts.edits_of(config.student, teacher):
        raise ValueError(
            f"synthesis.method={config.synthesis.method} makes images with the student, whose channels are fewer than "
            "its architecture has; use another method"
        )


def columns(config: TrialConfig, kept: pruning.Masks) -> dict[str, Any]:
    """The column with the number of a file's zeros that are kept; null without a file."""
    count = sum(int((~mask).sum()) for mask in kept.values())
    return {"num_kept_zeros": None if config.student.weights is None else count}


def warnings_of(config: TrialConfig, teacher: Teacher) -> Iterator[str]:
    """What the user should know of a student's file."""
    if config.student.weights is None:
        return
    network, said = starts.network_of(config.student, teacher)
    yield from said
    kept = zeros(network, config)
    empty = [name for name, mask in kept.items() if not mask.any()]
    if empty:
        yield f"all weights of {one_line(', '.join(empty), 120)} are zero in student.weights, and stay so"
    masked = kept or config.pruning.sparsity > 0
    if masked and config.student.architecture is not None and config.reconstruction.num_images > 0:
        yield "no layer-wise reconstruction: student.weights is of another architecture than the teacher"
