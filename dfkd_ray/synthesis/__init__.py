"""The interface of synthesis methods. Each gives a function `batch(i)`, pure in (teacher, config, i).

`config.METHODS` has one row per method, which names the method's module. The module defines:

* `source(teacher, config, key, device) -> BatchSource`: the batches; their seeds are derived from `key`. A measured
  term that the row does not declare is logged and left out of the tables.
* `check(teacher, config, where)`, if the method needs something of the teacher: raises `ValueError` with the reason.
  `where` is the dotted name of the config, for the message.
* `pin(teacher, config) -> config`, if images depend on a file other than the weights: adds the file's hash.

The module of a method in rounds (`Method.is_stationary` is false) defines instead or in addition:

* `source(teacher, config, key, device, state, student)`: the batches of one round. `state` is its `RoundState`.
  `student` is the network that the round uses, in eval mode on `device`, or None. A batch's `contribution` is its
  summand of the next state.
* `first_state(teacher, config) -> arrays`: the state of round 0, which uses no student.
* `advance(teacher, config, state, contributions, student) -> arrays`: the state of the next round. `contributions` is
  the sum over the batches of `state`'s round. It must be pure: a trial that was killed calls it again.
* `plain(config) -> config`, if round 0 is that of a stationary method: its config. Trials of that method share round
  0, and its images and labels are the `contributions` to round 1 (arrays `images` and `labels`, as stored).

Real images have no module: they are injected (see `dfkd_ray.trial.run`).
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
from dfkd_ray.config.fields import AUTO
from dfkd_ray.synthesis import memory


def module_of(config: Any) -> ModuleType | None:
    """The module that makes the images of a synthesis config; None if they are injected."""
    name = METHODS[config.method].module
    return None if name is None else importlib.import_module(name)


def check(teacher: Teacher, config: Any, where: str = "synthesis") -> None:
    """`ValueError` with the reason if this config cannot make images from this teacher."""
    of_method = getattr(module_of(config), "check", None)
    if of_method is not None:
        of_method(teacher, config, where)


def pinned(teacher: Teacher, config: Any, device: str = "auto", where: str = "synthesis") -> Any:
    """A synthesis config with the number that `batch_size: auto` stands for on a device of this machine.

    Also with the hashes of all files that its images depend on, other than the teacher's weights. `ValueError` if
    `where`, the config's dotted name, asks for a batch that does not fit.
    """
    if config.batch_size == AUTO:
        size = memory.fitting_batch_size(teacher, config, devices.resolve(device), where)
        config = config.model_copy(update={"batch_size": size})
    of_method = getattr(module_of(config), "pin", None)
    return config if of_method is None else of_method(teacher, config)


def first_round(teacher: Teacher, config: Any) -> tuple[Any, RoundState | None]:
    """Config and state of the images that a method begins with; no state for those of a stationary method."""
    if METHODS[config.method].is_stationary:
        return config, None
    module = module_of(config)
    assert module is not None
    plain = getattr(module, "plain", None)
    return (config, RoundState(0, module.first_state(teacher, config))) if plain is None else (plain(config), None)


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
    """The key of (teacher, config, domain, round), and its batches by index. Terms include host and numerics class.

    `state`: for methods in rounds. `student`: the config of the network whose weights the state holds.
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
    """The student that a round uses, in eval mode; None if it uses none."""
    if state.student is None:
        return None
    if student is None or student.architecture is None:
        network = deepcopy(teacher.network)
    else:
        shape, num_classes = teacher.info.input_shape, teacher.info.num_classes
        network = models.build(student.architecture, student.arguments, num_classes=num_classes, image_shape=shape)
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.student.items()})
    return devices.place(bundles.freeze(network), device)
