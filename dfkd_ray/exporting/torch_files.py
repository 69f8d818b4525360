"""Files for PyTorch: a program of `torch.export`, or source code with weights (see `source_code`)."""

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import bundles
from dfkd_ray.exporting import source_code, source_page
from dfkd_ray.exporting.comparison import Run
from dfkd_ray.exporting.metadata import INPUT
from dfkd_ray.models import adapting
from dfkd_ray.untrusted import reason

EXTRA_FILE = "dfkd_ray.json"  # of a torch.export archive
MODEL, WEIGHTS = "model.py", "weights.safetensors"


class Whole(nn.Module):
    """A network with the hooks that adapt it: exporters look at a module's `forward`, and hooks are around it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.copies = adapting.copy_images in network._forward_pre_hooks.values()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images (batch, *input_shape)."""
        return self.network(images.clone() if self.copies else images)


def program(network: nn.Module, input_shape: Sequence[int]) -> Any:
    """The network as a `torch.export.ExportedProgram` of any batch size.

    `ValueError` with the exporter's reason if it cannot be followed.
    """
    images = adapting.random_images(input_shape, 3)
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # it prints the whole graph before it refuses
            return torch.export.export(Whole(network), (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        why = f"torch.export says {reason(error, 200)}"
        if "data-dependent expression" in str(error):
            why = "its code branches on the values of images, and a file has one sequence of operations"
        raise ValueError(f"the network cannot be exported with a free batch size: {why}") from error


def program_files(exported: Any, texts: Mapping[str, str]) -> dict[str, bytes]:
    """An archive of `torch.export.save`."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files={EXTRA_FILE: json.dumps(dict(texts), indent=2)})
    return {".pt2": buffer.getvalue()}


def open_program(path: Path) -> Run:
    """Runs an archive, on the CPU."""
    return runs(torch.export.load(path).module())


def read_program(path: Path) -> dict[str, str]:
    """The metadata of an archive."""
    extra: dict[str, Any] = {EXTRA_FILE: ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra[EXTRA_FILE])


def traced(network: nn.Module, input_shape: Sequence[int]) -> source_code.Source:
    """The network as source code and weights. `ValueError` if it cannot be traced."""
    return source_code.source(Whole(network))


def source_files(source: source_code.Source, texts: Mapping[str, str]) -> dict[str, bytes]:
    """`model.py`, and its weights with the metadata."""
    code = source_page.page(source, texts)
    return {MODEL: code.encode(), WEIGHTS: bundles.safetensors_bytes(source.weights, dict(texts))}


def open_source(path: Path) -> Run:
    """Runs a folder of `source_files`."""
    spec = importlib.util.spec_from_file_location("dfkd_ray_exported_model", path / MODEL)
    assert spec is not None and spec.loader is not None
    module = ModuleType(spec.name)
    module.__file__ = str(path / MODEL)
    # Not by the loader, which would leave compiled files beside it.
    exec(compile((path / MODEL).read_text(encoding="utf-8"), str(path / MODEL), "exec"), vars(module))
    return runs(module.load())


def read_source(path: Path) -> dict[str, str]:
    """The metadata of a folder."""
    from safetensors import safe_open

    with safe_open(path / WEIGHTS, framework="pt") as file:
        return file.metadata()


def runs(network: Any) -> Run:
    """A module as a function of arrays."""

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    return run
