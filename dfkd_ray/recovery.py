"""The Python function `recover(network, …)`: makes one network smaller in memory, without files and Ray."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Unpack

import numpy as np
from torch import nn

from dfkd_ray import bundles, trial
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Description, Teacher
from dfkd_ray.config import Effort, TrialConfig, validate, with_effort, with_overrides
from dfkd_ray.storage import Folder, Where


@dataclass(frozen=True)
class Recovered:
    """The result of a recovery: the student (eval mode, on the CPU), the row of measurements, and the synthetic images.

    `row` has the columns of the table `trials`. `images` is (num_images, *input_shape) as stored (uint8 over the pixel
    range by default), `labels` int64 (num_images,), -1 without a label. `int8` is the student's
    ONNX file with int8 weights and activations, None without `quantisation.int8`.
    """

    student: nn.Module
    row: dict[str, Any]
    images: np.ndarray
    labels: np.ndarray
    int8: bytes | None = None


def recover(
    network: nn.Module | Teacher | str,
    *,
    sparsity: float = 0.75,
    effort: Effort = "standard",
    settings: Mapping[str, Any] | None = None,
    test: Iterable[Batch] | None = None,
    cache_root: Where | None = None,
    progress: bool = True,
    download: bool = False,
    **described: Unpack[Description],
) -> Recovered:
    """Prune a copy of a network, make images from the network alone, and distil the network into its pruned copy.

    `network`: a module in memory, which needs `input_shape`, `num_classes`, `mean` and `std` (see
    `Teacher.from_network`); or a teacher; or the name or folder of a bundle; or a library's network
    (`"timm:resnet18"`), whose weights are fetched only with `download`. It is not modified. `effort`: a first answer
    (`fast`), the defaults (`standard`), or a night's work (`thorough`). `settings`: further fields of a `TrialConfig`
    by dotted name, such as `{"distillation.num_steps": 100}`; they go before the effort's. `test`: test batches, for
    reporting only. `cache_root`: the cache folder for images; None caches nothing. `progress`: show progress.

    `ValueError` for invalid arguments, `RuntimeError` with the reason if the recovery fails.

    >>> import dfkd_ray
    >>> quick = {"bn_num_images": 32, "distillation.num_images": 32, "distillation.num_steps": 4}
    >>> quick |= {"synthesis.num_steps": 2, "synthesis.batch_size": 32, "reference.synthesis.num_steps": 2}
    >>> quick |= {"reference.num_images": 32, "reference.synthesis.batch_size": 32}
    >>> done = dfkd_ray.recover("fashion_mnist_resnet8", sparsity=0.9, settings=quick, progress=False)
    >>> round(done.row["achieved_sparsity"], 3)
    0.9
    >>> done.images.shape
    (32, 1, 32, 32)
    """
    check_network(network)
    if isinstance(network, nn.Module):
        teacher = Teacher.from_network(network, **described)
    elif described:
        raise ValueError(f"{', '.join(described)}: of a network in memory only; a teacher says it itself")
    else:
        teacher = network if isinstance(network, Teacher) else bundles.load(network, download=download)
    data = with_overrides({"teacher": teacher.name}, {"pruning.sparsity": sparsity, **(settings or {})})
    config = validate(TrialConfig, with_effort(data, effort), "settings")
    batches = None if test is None else checked_batches(test)
    inputs = trial.Inputs(batches, images=trial.Local(cache_root))
    outcome = trial.run(config, teacher, inputs, observer=trial.Observer(progress=bars() if progress else None))
    if outcome.student is None:
        raise RuntimeError(f"the recovery has failed: {outcome.row['reason']}")
    made = outcome.batches[0]
    images = made.images.reshape(len(made.images), *teacher.info.input_shape)
    return Recovered(outcome.student, outcome.row, images, made.labels, outcome.int8)


def check_network(network: Any) -> None:
    """`ValueError` for what is no network, nor names one."""
    if not isinstance(network, nn.Module | Teacher | str | PurePath | Folder):
        kind = f"the class {network.__name__}" if isinstance(network, type) else f"of type {type(network).__name__}"
        raise ValueError(f"network is {kind}: expected an nn.Module, a teacher, or the name or folder of a bundle")


def checked_batches(test: Any) -> list[Batch]:
    """Test batches as a list; `ValueError` for anything else."""
    kind = type(test).__name__
    if not isinstance(test, Iterable):
        raise ValueError(f"test: expected a list of dfkd_ray.batches.Batch, got a value of type {kind}")
    batches = list(test)
    for batch in batches:
        if not isinstance(batch, Batch):
            raise ValueError(f"test: expected a list of dfkd_ray.batches.Batch, got a {type(batch).__name__} in it")
    return batches


def bars() -> Any:
    """The progress display for a terminal, a notebook or a log."""
    from dfkd_ray.cli.show import Progress

    return Progress()
