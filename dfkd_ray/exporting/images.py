"""The images on which a written file is compared with its network, and those on which int8 is calibrated.

They come from the network alone: synthesised from its BatchNorm statistics, or from its activation records, else they
are Gaussian noise. Compared is on mixtures (see `evaluation.mixtures`): the network is sure of the images themselves,
and a damaged copy could still agree on all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfkd_ray import batchnorm, devices, evaluation, synthesis
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import parse_synthesis
from dfkd_ray.image_sources import Local, Round, gather
from dfkd_ray.images import decode
from dfkd_ray.storage import Where

NUM_COMPARED, NUM_CALIBRATION = 128, 256
SIZES = {"batch_size": 128, "num_steps": 30}  # of DeepInversion: the steps of the effort `fast`
RECORD_STEPS = 100  # a tenth of the method's default: the images need not be good, only like those of the training
RECORD_KINDS = ("spectral_pairs", "spectral", "all", "top")  # the first that there is
Progress = Callable[[str, int, int, Mapping[str, float | int]], None]


@dataclass(frozen=True)
class Making:
    """Where synthetic images are made and kept: the device (auto, cpu, cuda), the cache (None: no cache), progress."""

    device: str = "auto"
    cache_root: Where | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Images:
    """Normalised float32 images, each (n, *input_shape). `source`: where they come from, for the result."""

    compared: np.ndarray
    calibration: np.ndarray | None
    source: str


def made(teacher: Teacher, calibrates: bool, making: Making = Making()) -> Images:
    """Make the images, or read them from the cache. `ValueError` if the device or a record cannot be used."""
    method, source = method_of(teacher)
    settings = parse_synthesis(method)
    synthesis.check(teacher, settings)
    settings = synthesis.pinned(teacher, settings, making.device)
    source_of = Local(making.cache_root)
    report = making.progress or (lambda _stage, _done, _total, _numbers: None)
    place = devices.resolve(making.device)

    def gathered(num_images: int, domain: str, stage: str) -> np.ndarray:
        wanted = Round(teacher, settings, place, domain)
        num_batches = -(-num_images // settings.batch_size)
        return gather(source_of, wanted, num_batches, stage, report).pool.images[:num_images]

    plain = gathered(NUM_COMPARED, "reference", "images to compare on")
    compared = normalised(teacher, evaluation.mixtures(plain, teacher.info.space))
    calibration = None
    if calibrates:
        calibration = normalised(teacher, gathered(NUM_CALIBRATION, "train", "images to calibrate on"))
    return Images(compared, calibration, source)


def method_of(teacher: Teacher) -> tuple[dict[str, Any], str]:
    """The synthesis config that makes images from a teacher, and what the images are called."""
    if batchnorm.layers(teacher.network):
        return {"method": "deepinversion", **SIZES}, "synthesised from its BatchNorm statistics"
    kinds = teacher.record_kinds()
    kind = next((kind for kind in RECORD_KINDS if kind in kinds), None)
    if kind is not None:
        made_from = f"synthesised from its activation record {kind}"
        return {"method": "records", "record": kind, "num_steps": RECORD_STEPS, "batch_size": 128}, made_from
    return {"method": "noise", "batch_size": 128}, "Gaussian noise: it has neither BatchNorm nor activation records"


def normalised(teacher: Teacher, images: np.ndarray) -> np.ndarray:
    """Stored images as the network takes them: float32 (n, *input_shape)."""
    pixels = images if images.ndim == 4 else images[:, :, None]
    return decode(pixels, teacher.info.space).reshape(len(images), *teacher.info.input_shape).numpy()
