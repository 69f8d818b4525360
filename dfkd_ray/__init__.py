"""Make trained networks small without their training data.

The input is a teacher network. The result is a pruned or smaller student, distilled on images that are made from the
teacher alone. Importing this package has no side effects and imports neither torch nor Ray.

* `recover(network, …)`: one network, in memory or from a bundle; returns `.student`, `.row`, `.images`.
* `export(network, path, …)`: a network as ONNX, torch.export, OpenVINO or PyTorch source code.
* `Teacher.from_network(network, …)`, `load(name)`: a network with the description of its input images.
* `TrialConfig`: all options of one trial. * `sweep`: many trials on Ray Tune. * `results`: their tables.
"""

import importlib

TYPE_CHECKING = False  # not from `typing`: with `python -m` the working folder shadows the standard library here
if TYPE_CHECKING:
    from dfkd_ray import results, sweep
    from dfkd_ray.bundles import Teacher, load
    from dfkd_ray.config import TrialConfig
    from dfkd_ray.exporting import Exported, export
    from dfkd_ray.recovery import Recovered, recover

__version__ = "0.1.0"
__all__ = ["Exported", "Recovered", "Teacher", "TrialConfig", "export", "load", "recover", "results", "sweep"]

# Name → module that has it; None: it is a module of this package.
LAZY = {
    "Exported": "exporting",
    "Recovered": "recovery",
    "Teacher": "bundles",
    "TrialConfig": "config",
    "export": "exporting",
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
