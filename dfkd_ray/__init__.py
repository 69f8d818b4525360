"""Make trained networks small without their training data.

A teacher goes in; a pruned or smaller student that is as accurate comes out, distilled on images that are
made from the teacher alone. Importing this package does nothing: no device, no seed, no Ray, no torch.

* `recover(network, …)`: one network, in memory or from a bundle; gives `.student`, `.row`, `.images`.
* `Teacher.from_network(network, …)`, `load(name)`: a network with what has to be said of its images.
* `TrialConfig`: every option of one trial. * `sweep`: many trials over Ray Tune. * `results`: their tables.
"""

import importlib

TYPE_CHECKING = False  # not from `typing`: with `python -m` the working folder comes before Python's library here
if TYPE_CHECKING:
    from dfkd_ray import results, sweep
    from dfkd_ray.bundles import Teacher, load
    from dfkd_ray.config import TrialConfig
    from dfkd_ray.recovery import Recovered, recover

__version__ = "0.1.0"
__all__ = ["Recovered", "Teacher", "TrialConfig", "load", "recover", "results", "sweep"]

# Name → module that has it; None: it is a module of this package.
LAZY = {
    "Recovered": "recovery",
    "Teacher": "bundles",
    "TrialConfig": "config",
    "load": "bundles",
    "recover": "recovery",
    "results": None,
    "sweep": None,
}


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = LAZY[name]
    if module is None:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
