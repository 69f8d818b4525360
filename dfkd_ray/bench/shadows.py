"""Shadow teachers of a privacy audit: their halves of the data, their students, and the scores of audited images.

The audit's question is about the teacher's training set. So each shadow is a whole run of what users run: a teacher
trained on a half, and the networks and images that are made of it. An *arm* is what an attacker holds:

teacher    the teacher itself
real       a student distilled on real images of the teacher's own half
recovered  a student distilled on synthetic images, by default of DeepInversion
records    a student distilled on images from the teacher's activation records
nearest    the synthetic images of `recovered`, by their distance from an audited image in the teacher's features
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import nn

from dfkd_ray import bundles, checkpoints, devices, evaluation, features, models, sweep, trial, untrusted
from dfkd_ray.batches import Batch, mix_seed
from dfkd_ray.bench import membership, rates
from dfkd_ray.bundles import BundleInfo, Teacher
from dfkd_ray.config import (
    METHODS,
    STRICT,
    RealConfig,
    RecordsConfig,
    TeacherTrainingConfig,
    TrialConfig,
    stable_hash,
    synthesis_key,
    with_effort,
)
from dfkd_ray.config.fields import Count, Seed, Share
from dfkd_ray.devices import Runtime
from dfkd_ray.image_sources import gather
from dfkd_ray.records import fitting
from dfkd_ray.storage import Folder

log = logging.getLogger(__name__)
Arm = Literal["teacher", "real", "recovered", "records", "nearest"]
STUDENTS = ("real", "recovered", "records")  # arms whose networks are trials of the sweep
TEACHERS, TRAININGS, SWEEP, CACHE, SCORES = "teachers", "training", "sweep", "cache", "scores"  # folders
SHIFT = 2  # pixels of shifted queries, the largest shift in training
MOST_QUERIES = 6
RECORD_BYTES = 8_000_000  # of one shadow's activation record: all of them are in memory at once


class AuditConfig(BaseModel):
    """A privacy audit: the shadows, what is made of each, and what is attacked."""

    model_config = STRICT

    num_shadows: Count = Field(default=32, ge=membership.FEWEST_MODELS, description="shadow teachers, an even number")
    num_images: Count = Field(
        default=60_000, ge=20, description="images of the data set that halves are drawn from, with the canaries"
    )
    num_audited: Count = Field(default=4000, ge=10, description="images with their own labels that are attacked")
    num_canaries: Count = Field(
        default=200, ge=0, description="images with wrong labels, attacked too: the worst case; half in each teacher"
    )
    num_queries: Count = Field(
        default=MOST_QUERIES, ge=1, le=MOST_QUERIES, description="the image, flipped, and shifted by 2 pixels each way"
    )
    fprs: tuple[Share, ...] = Field(
        default=(0.01, 0.001), min_length=1, max_length=2, description="false positive rates at which attacks are read"
    )
    arms: tuple[Arm, ...] = Field(default=("teacher", "real", "recovered", "records", "nearest"), min_length=1)
    seed: Seed = Field(default=0, description="of the halves, and of the choice of images and canaries")
    training: TeacherTrainingConfig = Field(description="of each shadow teacher; `seed` counts up from theirs")
    trial: TrialConfig = Field(description="of each student, but for its teacher and its images")
    records: RecordsConfig = Field(description="the images of the arm records")

    @model_validator(mode="after")
    def _can_be_audited(self) -> "AuditConfig":
        if self.num_shadows % 2:
            raise ValueError(f"num_shadows={self.num_shadows}: expected an even number, each image is in half of them")
        attacked = self.num_audited + self.num_canaries
        if attacked > self.num_images:
            raise ValueError(
                f"num_audited and num_canaries are {attacked:,} together, of num_images={self.num_images:,}; lower them"
            )
        if self.training.num_validation:
            raise ValueError(
                f"training.num_validation={self.training.num_validation} would leave out images that count as members; "
                "set it to 0"
            )
        if not METHODS[self.trial.synthesis.method].is_data_free:
            raise ValueError(
                f"trial.synthesis.method={self.trial.synthesis.method} is an arm of its own; give a data-free method"
            )
        if "nearest" in self.arms and not METHODS[self.trial.synthesis.method].is_stationary:
            raise ValueError(
                f"the arm nearest needs images that no student has changed, and trial.synthesis.method="
                f"{self.trial.synthesis.method} changes them; leave the arm out"
            )
        num_pairs = self.num_audited * self.num_shadows // 2
        for fpr in self.fprs:
            if fpr <= 0 or num_pairs < rates.fewest_non_members(fpr):
                raise ValueError(
                    f"fprs={fpr:g}: num_audited={self.num_audited:,} images and num_shadows={self.num_shadows} give "
                    f"{num_pairs:,} non-members, which do not resolve it; raise one of them or leave the rate out"
                )
        return self


BASE: dict[str, Any] = {
    "training": {"architecture": "resnet8", "dataset": "fashion_mnist"},
    "trial": {  # a thread each: trials run side by side
        "teacher": "shadow",
        "pruning": {"sparsity": 0.75},
        "synthesis": {"num_threads": 1},
        "distillation": {"num_threads": 1},
        "reference": {"synthesis": {"num_threads": 1}},
    },
    "records": {"record": "all", "batch_size": 256, "num_steps": 200, "num_threads": 1},
}
# Beneath what is set. `quick` fits into three hours on two cores and leaves the arm `records` out. `memorising` is the
# audit's test of itself: each teacher learns 500 images by heart.
SIZES: dict[str, dict[str, Any]] = {
    "standard": BASE,
    "quick": BASE
    | {
        "num_shadows": 16,
        "num_images": 20_000,
        "arms": ["teacher", "real", "recovered", "nearest"],
        "trial": with_effort(BASE["trial"], "fast"),
    },
    "memorising": BASE
    | {
        "num_shadows": 16,
        "num_images": 1000,
        "num_audited": 800,
        "num_queries": 1,
        "arms": ["teacher"],
        "training": BASE["training"] | {"num_epochs": 50, "batch_size": 32, "shift": 0, "flip": False},
    },
}


@dataclass(frozen=True)
class Source:
    """The data set that halves are drawn from, and what trains a teacher; both are handed in.

    `read(rows)` gives uint8 images (n, channels, height, width), `labels` is int64 (num_images,).
    `train(config, rows, labels, checkpoint)` trains on these rows with these labels, and resumes in that folder.
    """

    read: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray
    num_classes: int
    train: Callable[[TeacherTrainingConfig, np.ndarray, np.ndarray, Path], tuple[BundleInfo, nn.Module]]


@dataclass(frozen=True)
class Audit:
    """What a config and a data set determine: images, labels, canaries and halves. Indices are into `rows`."""

    config: AuditConfig
    source: Source

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows of the data set that take part. The first are the canaries, then the other audited ones."""
        if self.config.num_images > len(self.source.labels):
            raise ValueError(
                f"num_images={self.config.num_images:,}: the data set has {len(self.source.labels):,}; lower it"
            )
        order = np.random.default_rng(mix_seed(self.config.seed, 1)).permutation(len(self.source.labels))
        return order[: self.config.num_images]

    @cached_property
    def labels(self) -> np.ndarray:
        """Their labels; each canary's is one of the wrong classes, drawn evenly."""
        labels = self.source.labels[self.rows].copy()
        rng, num = np.random.default_rng(mix_seed(self.config.seed, 2)), self.config.num_canaries
        labels[:num] = (labels[:num] + rng.integers(1, self.source.num_classes, num)) % self.source.num_classes
        return labels

    @cached_property
    def keep(self) -> np.ndarray:
        """(shadows, images): which teacher is trained on which image."""
        return membership.halves(self.config.num_shadows, self.config.num_images, mix_seed(self.config.seed, 3))

    @property
    def num_attacked(self) -> int:
        """Canaries and other audited images."""
        return self.config.num_canaries + self.config.num_audited

    @cached_property
    def images(self) -> np.ndarray:
        """The attacked images, uint8."""
        return self.source.read(self.rows[: self.num_attacked])

    @cached_property
    def hash(self) -> str:
        """Of what determines the scores: config, all labels, and the attacked images."""
        images = bundles.sha256(np.ascontiguousarray(self.images).tobytes() + self.labels.astype("<i8").tobytes())
        fields = self.config.model_dump(mode="json", exclude={"arms", "fprs"})
        return stable_hash({"config": fields, "images": images})

    def members(self, index: int) -> np.ndarray:
        """The images that a shadow is trained on."""
        return np.flatnonzero(self.keep[index])

    def trial_of(self, arm: str, index: int) -> TrialConfig:
        """The trial of a student."""
        own: dict[str, Any] = {"teacher": name_of(index)}
        if arm == "real":
            own["synthesis"] = real_config(self.config)
        elif arm == "records":
            own["synthesis"] = self.config.records
        return self.config.trial.model_copy(update=own)


def name_of(index: int) -> str:
    """The name of a shadow teacher."""
    return f"shadow-{index:03d}"


def check(audit: Audit) -> None:
    """`ValueError` for what would fail only after hours of training."""
    config = audit.config
    architecture = config.training.architecture
    if models.untrusted_module(architecture, ()) is not None:
        raise ValueError(f"training.architecture={architecture!r} is code; an audit takes a network's name")
    if "real" in config.arms:
        wanted = real_images_wanted(config)
        least = int(audit.keep.sum(axis=1).min())
        if least < wanted:
            raise ValueError(
                f"the arm real takes {wanted:,} images, and a half has {least:,}; lower the trial's numbers"
            )
    missing = set(range(audit.source.num_classes)) - set(np.unique(audit.labels).tolist())
    if missing:
        raise ValueError(f"no image of class {min(missing)} among num_images={config.num_images:,}; raise it")
    if "nearest" in config.arms:
        shape, arguments = audit.images.shape[1:], config.training.arguments
        network = models.build(architecture, arguments, num_classes=audit.source.num_classes, image_shape=shape)
        if features.last_linear(network) is None:
            raise ValueError(f"the arm nearest needs a Linear layer, and {architecture} has none; leave the arm out")


def real_config(config: AuditConfig) -> RealConfig:
    """Real images in batches as large as the synthetic ones."""
    made = config.trial.synthesis
    size = made.batch_size if isinstance(made.batch_size, int) else RealConfig().batch_size
    return RealConfig(seed=made.seed, batch_size=size)


def real_images_wanted(config: AuditConfig) -> int:
    """Real images of one trial, in whole batches."""
    most = max(config.trial.distillation.num_images, config.trial.bn_num_images)
    size = real_config(config).batch_size
    return -(-most // size) * size


def teacher_of(audit: Audit, index: int, out: Folder) -> Teacher:
    """A shadow teacher: its bundle, or trained now, with its activation records where an arm needs them."""
    place, config = out / TEACHERS / name_of(index), audit.config
    if not bundles.is_bundle(place):
        settings = config.training.model_copy(update={"seed": config.training.seed + index})
        members = audit.members(index)
        training = out / TRAININGS / name_of(index)
        training.path.mkdir(parents=True, exist_ok=True)
        info, network = audit.source.train(settings, audit.rows[members], audit.labels[members], training.path)
        # Without the data set's name: a part of it was not trained on, and some labels were changed.
        notes = {"shadow": {"index": index, "audit": audit.hash}}
        info = info.model_copy(update={"dataset": None, "notes": info.notes | notes})
        bundles.save(place, info, network.state_dict())
        training.clear(lambda name: name == checkpoints.FILE)
    teacher = bundles.load(place)
    if teacher.info.notes.get("shadow") != {"index": index, "audit": audit.hash}:
        raise ValueError(f"{place}: it is the teacher of another audit; give another folder")
    if "records" in config.arms and config.records.record not in teacher.record_kinds():
        save_record(audit, index, teacher)
    return teacher


def save_record(audit: Audit, index: int, teacher: Teacher) -> None:
    """Record a teacher's activations on its half, into its bundle."""
    members, kind = audit.members(index), audit.config.records.record

    def read(chosen: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(audit.source.read(audit.rows[chosen.numpy()])))

    labels = torch.from_numpy(audit.labels)
    plan = fitting.plan(teacher, audit.labels, members, [kind], fitting.Options(max_bytes=RECORD_BYTES))
    (shard,) = fitting.shards(read, labels, members, 1)
    totals = fitting.fit(plan, teacher.network, shard, audit.config.training.num_threads)
    (record,) = fitting.finish(plan, totals, teacher)
    assert teacher.folder is not None
    bundles.save_record(teacher.folder, record)


def jobs_of(audit: Audit, teachers: Sequence[Teacher]) -> dict[tuple[str, int], sweep.Job]:
    """(arm, shadow) → trial, of all students."""
    wanted = [(arm, index) for arm in STUDENTS if arm in audit.config.arms for index in range(len(teachers))]
    found = {}
    for arm, index in wanted:
        (job,) = sweep.plan([audit.trial_of(arm, index)], lambda _name, index=index: teachers[index])
        found[arm, index] = job
    return found


def real_source(audit: Audit, teacher: Teacher, settings: RealConfig) -> Callable[[int], Batch]:
    """Real images of a teacher's own half, in a seeded order; it holds no more of them than a trial takes."""
    index = teacher.info.notes["shadow"]["index"]
    order = np.random.default_rng(mix_seed(settings.seed, 0x4EA1, index)).permutation(audit.members(index))
    chosen = order[: real_images_wanted(audit.config)]
    key = synthesis_key(teacher.hash, settings, f"real:{audit.hash}")
    return partial(real_batch, audit.source.read(audit.rows[chosen]), audit.labels[chosen], key, settings.batch_size)


def real_batch(images: np.ndarray, labels: np.ndarray, key: str, size: int, index: int) -> Batch:
    """Batch `index` of these images."""
    own = slice(index * size, (index + 1) * size)
    return Batch(index, images[own], labels[own], key)


def queries(images: np.ndarray, num: int) -> list[np.ndarray]:
    """The images (n, channels, height, width) and augmented copies: flipped, shifted over black in four directions."""
    found = [images, images[:, :, :, ::-1]]
    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    height, width = images.shape[2:]
    for down, right in ((0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT)):
        found.append(padded[:, :, down : down + height, right : right + width])
    return [np.ascontiguousarray(query) for query in found[:num]]


def logits_scores(network: nn.Module, audit: Audit, runtime: Runtime) -> np.ndarray:
    """phi of the attacked images (examples, queries): their log odds."""
    labels, found = audit.labels[: audit.num_attacked], []
    network = trial.on_device(network, runtime.device)
    with runtime.numerics():
        for query in queries(audit.images, audit.config.num_queries):
            logits = evaluation.logits(network, query, runtime).cpu().numpy()
            found.append(membership.log_odds(logits, labels))
    return np.stack(found, axis=1)


def distance_scores(teacher: Teacher, synthetic: np.ndarray, audit: Audit, runtime: Runtime) -> np.ndarray:
    """phi of the attacked images (examples, queries): -log of the distance to the nearest synthetic image.

    Distances are Euclidean, between the inputs of the teacher's last Linear layer.
    """
    network = trial.on_device(teacher.network, runtime.device)

    def features_of(images: np.ndarray) -> torch.Tensor:
        with features.last_linear_inputs(network) as seen:
            evaluation.logits(network, images, runtime)
        return torch.cat(seen).double()

    with runtime.numerics():
        made = features_of(synthetic)
        nearest = [
            torch.cat([torch.cdist(part, made).amin(dim=1) for part in features_of(query).split(500)])
            for query in queries(audit.images, audit.config.num_queries)
        ]
    return -np.log(torch.stack(nearest, dim=1).cpu().numpy().clip(min=1e-12))


def synthetic_images(teacher: Teacher, config: TrialConfig, out: Folder) -> tuple[np.ndarray, str]:
    """The images that the trial was given, from its cache or made again, and their key."""
    device = devices.resolve(config.device)
    wanted = trial.Round(teacher, config.synthesis, device, student=config.student.structure)
    num_batches = trial.batches_wanted(config, reestimates=True)[1]
    images = trial.Local((out / CACHE).uri)
    found = gather(images, wanted, num_batches, "synthesising", lambda _stage, _done, _total, _shown: None)
    return found.pool.images, found.key


def scores_of(audit: Audit, arm: str, index: int, teacher: Teacher, job: sweep.Job | None, out: Folder) -> np.ndarray:
    """phi of an arm and shadow, float64 (attacked images, queries): from its file, or computed and written there."""
    space, num_threads = teacher.info.space, audit.config.training.num_threads
    runtime = Runtime(devices.resolve(audit.config.trial.device), space, "float32", num_threads)
    network, of = teacher.network, teacher.hash
    if job is not None:
        student = bundles.load(out / SWEEP / "students" / job.id)
        network, of = student.network, student.hash
    name, plain = f"{arm}-{index:03d}.safetensors", {"audit": audit.hash, "network": of}
    found = read_scores(out / SCORES, name, plain, (audit.num_attacked, audit.config.num_queries))
    if found is not None:
        return found
    if arm == "nearest":
        config = trial.pinned(audit.trial_of("recovered", index), teacher)
        made, _ = synthetic_images(teacher, config, out)
        phi = distance_scores(teacher, made, audit, runtime)
    else:
        phi = logits_scores(network, audit, runtime)
    checkpoints.write_file(out / SCORES, name, {"phi": torch.from_numpy(phi)}, plain)
    return phi


def read_scores(folder: Folder, name: str, plain: dict[str, Any], shape: tuple[int, int]) -> np.ndarray | None:
    """The scores in a file; None if it is not there. Damaged ones, or those of other networks, are logged and None."""
    try:
        found = checkpoints.read_file(folder, name, untrusted.free_bytes() // 2)
        if found is None:
            return None
        phi = found[1]["phi"]
        if found[0] != plain or tuple(phi.shape) != shape or phi.dtype != torch.float64 or not phi.isfinite().all():
            raise ValueError("they are of another network or audit")
    except (ValueError, KeyError) as error:
        log.warning("%s: the scores are not used and are made again: %s", folder / name, error)
        return None
    return phi.numpy()
