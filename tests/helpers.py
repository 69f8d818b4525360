"""What tests share: one tiny trial and the sweeps made of it, networks and teachers, what is said."""

import gzip
import struct
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dfkd_ray import batchnorm, bundles, config, devices, distillation, evaluation, models, sweep
from dfkd_ray.compression import pruning
from dfkd_ray.config import DistillationConfig, PruningConfig, TeacherTrainingConfig, flat, validate
from dfkd_ray.sweep import estimate

# ---- trials and sweeps -----------------------------------------------------------------------------------------------

ABOUT = {"source": "a test", "command": "none", "cost": "seconds", "expected": "rows"}
TINY_TRIAL: dict[str, Any] = {
    "bn_num_images": 8,
    "device": "cpu",
    "synthesis": {"batch_size": 8, "num_steps": 1, "num_threads": 1},
    "reconstruction": {"num_images": 16},
    "distillation": {"num_images": 8, "num_steps": 2, "batch_size": 8, "num_threads": 1},
    "reference": {"num_images": 8, "synthesis": {"batch_size": 8, "num_steps": 1, "num_threads": 1}},
    "latency": {"repeats": 3},  # each repeat takes 0.1 s of a trial whose student has another shape
}
TINY_NOISE = {"method": "noise", "batch_size": 8}  # the same number of images as above, without a step of synthesis
TINY_SETS = flat(TINY_TRIAL)  # dotted field -> value


def set_words(fields: Mapping[str, object]) -> list[str]:
    """The words that set fields on a command line."""
    return [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


TINY_WORDS = set_words(TINY_SETS)


def tiny_trial(teacher: str | Path = "t", /, **fields: Any) -> dict[str, Any]:
    """The plain data of the tiny trial, with dotted fields that differ."""
    return config.with_overrides(TINY_TRIAL, {"teacher": str(teacher), **fields})


def tiny_sweep(teacher: str | Path, grid: Any, /, **fields: Any) -> dict[str, Any]:
    """A sweep file's plain data: the tiny trial, with dotted fields that differ, over a grid."""
    return {"about": ABOUT, "base": tiny_trial(teacher, **fields), "grid": grid}


def sweep_of_four(teacher: str | Path) -> dict[str, Any]:
    """A sweep of two syntheses of eight batches, and four trials."""
    grid = {"synthesis.bn_weight": [0.2, 2.0], "pruning.sparsity": [0.5, 0.9]}
    longer = {"synthesis.num_steps": 20, "distillation.num_steps": 3, "reference.synthesis.num_steps": 2}
    larger = {"bn_num_images": 64, "distillation.num_images": 64, "reference.num_images": 16}
    return tiny_sweep(teacher, grid, **longer, **larger)


def sweep_of_twelve(teacher: str | Path) -> dict[str, Any]:
    """A sweep of two syntheses and twelve trials, each so long that something can happen to it."""
    grid = {
        "synthesis.bn_weight": [0.2, 2.0],
        "pruning.sparsity": [0.5, 0.7, 0.9],
        "distillation.temperature": [2.0, 6.0],
    }
    longer = {"synthesis.num_steps": 10, "distillation.num_steps": 60, "reference.synthesis.num_steps": 2}
    larger = dict.fromkeys(("bn_num_images", "distillation.num_images", "reference.num_images"), 16)
    looks = {"distillation.eval_every": 5, "distillation.checkpoint_every": 5}
    return tiny_sweep(teacher, grid, **longer, **larger, **looks)


def write_yaml(path: Path, data: object) -> Path:
    """A file of plain data; returns its path."""
    path.write_text(yaml.safe_dump(data))
    return path


def jobs_of(data: dict[str, Any]) -> list[sweep.Job]:
    """The trials of a sweep file's plain data."""
    return sweep.plan(sweep.expand(validate(sweep.SweepConfig, data), {}), bundles.load)


def costs_of(jobs: Sequence[sweep.Job]) -> dict[str, estimate.Cost]:
    """Made-up seconds of all units of these jobs."""
    made = {estimate.unit_of(one): estimate.Cost(4.0) for one in estimate.syntheses(jobs)}
    return made | {estimate.unit_of(job): estimate.Cost(2.0, 0.1) for job in jobs}


def estimated(
    jobs: Sequence[sweep.Job],
    costs: Mapping[str, estimate.Cost],
    num: int,
    kind: estimate.Kind = "CPU core",
    num_test_images: int = 0,
    num_cached: int = 0,
) -> estimate.Estimate:
    """What these trials cost on so many GPUs or cores."""
    made = estimate.syntheses(jobs, lambda _key: num_cached)
    tests = {job.teacher.hash: num_test_images for job in jobs}
    return estimate.estimate(jobs, made, costs, estimate.Machine(num, kind), tests)


def calibrated(jobs: Sequence[sweep.Job], cap_s: float) -> dict[str, estimate.Cost]:
    """What all units of work in these trials take here, timed in about so many seconds."""
    units = {estimate.unit_of(one): one for one in (*estimate.syntheses(jobs), *jobs)}
    return estimate.calibrate(units, torch.device("cpu"), cap_s)


# ---- networks and teachers -------------------------------------------------------------------------------------------

TINY_INFO = bundles.BundleInfo(
    architecture="resnet8",
    arguments={"width_multiplier": 0.5},
    num_classes=10,
    input_shape=(1, 16, 16),
    mean=(0.5,),
    std=(0.25,),
    trained=False,
)


def randomise_statistics(network: nn.Module, seed: int = 0) -> None:
    """Give every BatchNorm layer running statistics, weights and biases that look like those of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in batchnorm.layers(network):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            if layer.affine:
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.normal_(0, 0.3, generator=generator)


def tiny_network(seed: int = 0) -> nn.Module:
    """An untrained ResNet-8 of half width for 10 classes of 1x16x16 images."""
    torch.manual_seed(seed)
    network = models.build("resnet8", TINY_INFO.arguments, num_classes=10, image_shape=(1, 16, 16))
    randomise_statistics(network, seed)
    return network


def make_teacher(
    folder: Path,
    architecture: str = "lenet5",
    image_shape: tuple[int, int, int] = (1, 32, 32),
    num_classes: int = 3,
    seed: int = 0,
    **arguments: Any,
) -> bundles.Teacher:
    """An untrained teacher whose classes differ in their activations."""
    torch.manual_seed(seed)
    network = models.build(architecture, arguments, num_classes=num_classes, image_shape=image_shape)
    info = bundles.BundleInfo(
        architecture=architecture,
        arguments=arguments,
        num_classes=num_classes,
        input_shape=image_shape,
        mean=(0.3,) * image_shape[0],
        std=(0.3,) * image_shape[0],
        trained=False,
    )
    bundles.save(folder, info, network.state_dict())
    return bundles.load(str(folder))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have equal weights and statistics."""
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


# ---- training --------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
SMALL_DISTILLATION = DistillationConfig(
    num_steps=6, batch_size=8, learning_rate=0.05, eval_every=2, checkpoint_every=2, num_threads=1
)
SPARSE = PruningConfig(sparsity=0.8)
TEACHER_TRAINING = TeacherTrainingConfig(
    architecture="resnet8",
    arguments={"width_multiplier": 0.25},
    dataset="made",
    num_epochs=3,
    batch_size=16,
    num_validation=8,
    num_threads=1,
    device="cpu",
)


def a_pool(num_images: int = 24) -> distillation.Pool:
    """Random images with a label each."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 1, 16, 16), dtype=np.uint8)
    return distillation.Pool(images, np.arange(num_images) % 10)


def distilled(
    teacher,
    config=SMALL_DISTILLATION,
    pruning_config=SPARSE,
    student=None,
    checkpoint=None,
    progress=None,
    pool=None,
    on_epochs=None,
    pool_at=None,
):
    """A student that was distilled from a teacher, and the state that this ended with."""
    space = teacher.info.space
    if student is None:
        student = deepcopy(teacher.network).requires_grad_(True)
    masks = pruning.masks(student, pruning_config)
    if pruning_config.schedule == "one_shot":
        pruning.apply(student, masks)
    images = a_pool(16).images[::-1].copy()
    runtime = devices.Runtime(CPU, space, config.precision, config.num_threads, config.fast)
    reference = evaluation.reference(teacher.network, images, runtime)
    state = distillation.distil(
        student,
        teacher.network,
        pool_at or (lambda _step, _student: pool or a_pool()),
        config,
        pruning.Pruned(pruning_config, masks),
        reference,
        checkpoint=checkpoint,
        observer=distillation.Observer(progress=progress, epochs=on_epochs),
    )
    return student, state


# ---- what is said ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What a command line left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def assert_one_error(done: Done, code: int, *parts: str) -> None:
    """An exit code, and one line that is an error, with some parts in it."""
    assert done.code == code, (done.code, done.err)
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.err, done.err
    assert all(part in lines[0] for part in parts), lines[0]


def refusal(call: Callable[[], object], *parts: object) -> str:
    """The one line of a refusal, which names these parts."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert len(text) <= 420 and "\n" not in text, text
    for part in parts:
        assert str(part) in text, text
    return text


def write_idx_set(root: Path, num_images: int = 40) -> None:
    """MNIST's files with a few images: a digit is how bright its images are."""
    rng = np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem in ("train", "t10k"):
        labels = np.arange(num_images, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (num_images, 28, 28), dtype=np.uint8) + labels[:, None, None] * 19
        for name, array in (("images-idx3", images.astype(np.uint8)), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x800 | array.ndim, *array.shape)
            with gzip.open(folder / f"{stem}-{name}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())


def options_of(command: Any) -> set[str]:
    """Every option of a command and of those below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


def earlier_form(state, pruned):
    """A state dict as bundles stored it before `packing`: of a pruned tensor non-zero values, a bit a weight, shape."""
    stored = {}
    for name, tensor in state.items():
        if name in pruned:
            mask = (tensor != 0).flatten()
            stored[name + "::mask"] = torch.from_numpy(np.packbits(mask.numpy()))
            stored[name + "::mask::shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
            stored[name + "::values"] = tensor.flatten()[mask]
        else:
            stored[name] = tensor.clone()
    return stored
