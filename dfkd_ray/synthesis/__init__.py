"""Synthesis methods: each gives a source `batch(i)`, a pure function of (teacher, config, i).

A method is one module with one function `source(teacher, config, key, device) -> BatchSource` and one line in
`METHODS`. Real images are no method: they are injected (see `dfkd_ray.trial.run`).
"""

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dfkd_ray import devices
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import seeds_key, synthesis_key
from dfkd_ray.synthesis import deepinversion, noise, reconstruction

METHODS: dict[str, Callable[[Teacher, Any, str, torch.device], BatchSource]] = {
    "deepinversion": deepinversion.source,
    "records": reconstruction.source,
    "noise": noise.source,
}


def source(teacher: Teacher, config: Any, device: torch.device, domain: str = "train") -> tuple[str, BatchSource]:
    """The synthesis key of (teacher, config, domain), and its batches by index; their terms say where they are from."""
    key = synthesis_key(teacher.hash, config, domain)
    # A method's `key` is what its seeds come from.
    make = METHODS[config.method](teacher, config, seeds_key(teacher.hash, config, domain), device)

    def batch(index: int) -> Batch:
        made = replace(make(index), key=key)
        made.terms.update(host=socket.gethostname(), numerics=devices.numerics_class(device))
        return made

    return key, batch
