"""The state of a distillation: its counters, its best student so far, and their checkpoint."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dfkd_ray import checkpoints
from dfkd_ray.storage import Folder

log = logging.getLogger(__name__)
Snapshot = dict[str, Tensor]


@dataclass
class State:
    """The state of a distillation, as stored in a checkpoint.

    `seconds`: of distillation in all attempts, without waiting for images; `earlier_s`: of those before this one, which
    is not stored.
    """

    step: int = 0
    best_step: int = 0
    best_agreement: float = -1.0
    best_kl: float = math.inf
    looks_since_best: int = 0
    best: Snapshot = field(default_factory=dict)
    epochs: list[dict[str, float | int | None]] = field(default_factory=list)
    seconds: float = 0.0
    earlier_s: float = 0.0


NOT_PLAIN = ("best", "earlier_s")  # fields that are no plain data of a checkpoint


class Clock:
    """Counts seconds on top of those of earlier attempts."""

    def __init__(self, earlier_s: float):
        self.zero = time.perf_counter() - earlier_s

    def seconds(self) -> float:
        """The seconds so far, but for those that did not count."""
        return time.perf_counter() - self.zero

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Does not count the seconds within."""
        start = time.perf_counter()
        yield
        self.zero += time.perf_counter() - start


def write(folder: Folder, student: nn.Module, optimiser: torch.optim.SGD, state: State) -> None:
    """Write student, momentum, best student and counters atomically into one safetensors file."""
    tensors = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    plain = {name: value for name, value in vars(state).items() if name not in NOT_PLAIN}
    plain["best_kl"] = state.best_kl if math.isfinite(state.best_kl) else None
    checkpoints.write(folder, tensors, optimiser, plain)


def read(folder: Folder, student: nn.Module, optimiser: torch.optim.SGD, num_steps: int | None = None) -> State | None:
    """Restore student and momentum in place; returns counters and best student, or None without a checkpoint.

    A checkpoint that is damaged, or does not fit this student and `num_steps`, is logged and ignored.
    """
    try:
        found = checkpoints.read(folder, student)
        if found is None:
            return None
        plain, tensors = found
        own = student.state_dict()
        weights, momenta = checkpoints.part(tensors, "student.", own), checkpoints.momenta(tensors, optimiser)
        has_best = any(name.startswith("best.") for name in tensors)
        state = checked_state(plain, num_steps, has_best)
        state.best = checkpoints.part(tensors, "best.", own) if has_best else {}
    except ValueError as error:
        log.warning("%s is not used, the trial starts anew: %s", folder / checkpoints.FILE, error)
        return None
    student.load_state_dict(weights)
    checkpoints.put_momenta(momenta, optimiser)
    return state


def checked_state(plain: Mapping[str, object], num_steps: int | None, has_best: bool) -> State:
    """The counters of a checkpoint, without `best`. `ValueError` if the fields are not those of `State`, or the values
    are impossible for a distillation of `num_steps`.
    """
    fields = {name for name in vars(State()) if name not in NOT_PLAIN}
    plain = {"seconds": 0.0, **plain}  # older checkpoints do not know it
    if set(plain) != fields:
        raise ValueError(f"its fields are {', '.join(sorted(plain))[:100]}, expected {', '.join(sorted(fields))}")
    step = checkpoints.counter(plain, "step", num_steps if num_steps is not None else 2**53)
    agreement, kl, epochs = plain["best_agreement"], plain["best_kl"], plain["epochs"]
    numbers = [agreement, kl if kl is not None else 0.0]
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("best_agreement or best_kl is not a number")
    if not isinstance(agreement, int | float) or not (agreement == -1 or 0 <= agreement <= 1):
        raise ValueError("best_agreement is not between 0 and 1")
    if (agreement != -1) != has_best or (kl is None and has_best):
        raise ValueError("its best student does not match its counters")
    seconds = plain["seconds"]
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError("its seconds are no number from 0 on")
    if not has_best and step == num_steps:
        raise ValueError("it is at the last step but has no best student")
    if not isinstance(epochs, list) or not 1 <= len(epochs) <= step + 1 or not all(map(is_look, epochs)):
        raise ValueError("its evaluations have an invalid form")
    steps = [look["step"] for look in epochs]
    if steps != sorted(set(steps)) or steps[0] != 0 or steps[-1] > step:
        raise ValueError("its evaluations are at unexpected steps")
    return State(
        step=step,
        best_step=checkpoints.counter(plain, "best_step", step),
        best_agreement=float(agreement),
        best_kl=float(kl) if isinstance(kl, int | float) else math.inf,
        looks_since_best=checkpoints.counter(plain, "looks_since_best", len(epochs)),
        epochs=epochs,
        seconds=float(seconds),
        earlier_s=float(seconds),
    )


def is_look(entry: object) -> bool:
    """Whether an entry has the form that `look` writes: name → number or None, with a step."""
    return (
        isinstance(entry, dict)
        and type(entry.get("step")) is int
        and {"agreement", "reference_kl", "learning_rate", "sparsity"} <= set(entry)
        and all(value is None or type(value) in (int, float) for value in entry.values())
    )
