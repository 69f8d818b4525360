"""Synthesis methods: each gives a source `batch(i)`, a pure function of (teacher, config, i).

`config.METHODS` has a row per method, which names its module. What such a module has:

* `source(teacher, config, key, device) -> BatchSource`: the batches; `key` is what their seeds come from. A term that
  the row does not declare is logged and left out of the tables.
* `check(teacher, config, where)`, where it needs something of the teacher: `ValueError` with the reason. `where` is the
  dotted name of the config, for the message.
* `pin(teacher, config) -> config`, where images depend on a file beside the weights: the config with its hash.

A method that goes by rounds (`Method.is_stationary` is false) has further

* `source(teacher, config, key, device, state, student)`: batches of one round. `state` is its `RoundState`. `student`
  is the network that the round looks at, in eval mode on `device`, or None. A batch's `contribution` is what it adds
  to the next state.
* `first_state(teacher, config) -> arrays`: of round 0, which has seen no student.
* `advance(teacher, config, state, contributions, student) -> arrays`: of the round after `state`. `contributions` is
  the sum over the batches of `state`'s round. A pure function: it is called once in an undisturbed trial, and again in
  one that was killed.

Real images are made by no module: they are injected (see `dfkd_ray.trial.run`).
"""

import importlib
import socket
from copy import deepcopy
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkd_ray import bundles, devices, models
from dfkd_ray.batches import Batch, BatchSource, RoundState
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import METHODS, StudentConfig, round_key, seeds_key


def module_of(config: Any) -> ModuleType | None:
    """The module that makes the images of a synthesis config; None where they are injected."""
    name = METHODS[config.method].module
    return None if name is None else importlib.import_module(name)


def check(teacher: Teacher, config: Any, where: str = "synthesis") -> None:
    """`ValueError` with the reason where images of this config cannot be made from this teacher."""
    of_method = getattr(module_of(config), "check", None)
    if of_method is not None:
        of_method(teacher, config, where)


def pinned(teacher: Teacher, config: Any) -> Any:
    """A synthesis config with the hashes of all that its images depend on beside the teacher's weights."""
    of_method = getattr(module_of(config), "pin", None)
    return config if of_method is None else of_method(teacher, config)


def key_of(teacher: Teacher, config: Any, domain: str, state: RoundState | None, student: StudentConfig | None) -> str:
    """The key of (teacher, config, domain, round): equal keys, equal batches."""
    seen = None if state is None or state.student is None else student
    return round_key(teacher.hash, config, domain, None if state is None else state.hash, seen)


def source(
    teacher: Teacher,
    config: Any,
    device: torch.device,
    domain: str = "train",
    state: RoundState | None = None,
    student: StudentConfig | None = None,
) -> tuple[str, BatchSource]:
    """The key of (teacher, config, domain, round), and its batches by index; their terms say where they are from.

    `state` is that of a method which goes by rounds; `student` says what network the student in it is.
    """
    key = key_of(teacher, config, domain, state, student)
    module = module_of(config)
    assert module is not None, f"{config.method} images are injected"
    seeds = seeds_key(teacher.hash, config, domain, state.number if state else 0)
    looks = () if state is None else (state, student_in(teacher, state, student, device))
    make = module.source(teacher, config, seeds, device, *looks)

    def batch(index: int) -> Batch:
        made = replace(make(index), key=key)
        made.terms.update(host=socket.gethostname(), numerics=devices.numerics_class(device))
        return made

    return key, batch


def student_in(
    teacher: Teacher, state: RoundState, student: StudentConfig | None, device: torch.device
) -> nn.Module | None:
    """The student that a round looks at, in eval mode; None where it looks at none."""
    if state.student is None:
        return None
    if student is None or student.architecture is None:
        network = deepcopy(teacher.network)
    else:
        shape, num_classes = teacher.info.image_shape, teacher.info.num_classes
        network = models.build(student.architecture, student.arguments, num_classes=num_classes, image_shape=shape)
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.student.items()})
    return devices.place(bundles.freeze(network), device)
