"""What is audited: the config of a privacy audit, and the halves, labels and canaries that follow from it.

The audit's question is about the teacher's training set. So each shadow is a whole run of what users run: a teacher
trained on a half, and the networks and images that are made of it. An *arm* is what an attacker holds:

teacher    the teacher itself
real       a student distilled on real images of the teacher's own half
recovered  a student distilled on synthetic images, by default of DeepInversion
records    a student distilled on images from the teacher's activation records
nearest    the synthetic images of `recovered`, by their distance from an audited image in the teacher's features
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator
from torch import nn

from dfkd_ray import bundles, features, models, synthesis, trial
from dfkd_ray.batches import mix_seed
from dfkd_ray.bench import membership, rates
from dfkd_ray.bench.records import untrained
from dfkd_ray.bundles import BundleInfo
from dfkd_ray.config import (
    METHODS,
    STRICT,
    RealConfig,
    RecordsConfig,
    TeacherTrainingConfig,
    TrialConfig,
    stable_hash,
    versions,
    with_effort,
)
from dfkd_ray.config.fields import Count, Seed, Share

Arm = Literal["teacher", "real", "recovered", "records", "nearest"]
STUDENTS = ("real", "recovered", "records")  # arms whose networks are trials of the sweep
NOT_COMPARED = ("arms", "fprs")  # fields that change no score: arms may be added later
MOST_QUERIES = 6


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
        """Of what determines the scores: config, all labels, the attacked images, versions of the algorithms."""
        images = bundles.sha256(np.ascontiguousarray(self.images).tobytes() + self.labels.astype("<i8").tobytes())
        fields = self.config.model_dump(mode="json", exclude=set(NOT_COMPARED))
        return stable_hash({"config": fields, "images": images, "versions": versions()})

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
    if audit.source.num_classes < 2:
        raise ValueError("training.dataset: one class, expected at least two")
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
    shape, arguments = audit.images.shape[1:], config.training.arguments
    teacher = untrained(architecture, shape, audit.source.num_classes, arguments)
    for arm in set(config.arms) & {"real", "recovered"}:  # records do not exist yet
        trial.check(audit.trial_of(arm, 0), teacher, ())
    if "nearest" in config.arms:
        synthesis.check(teacher, config.trial.synthesis, "trial.synthesis")
        if features.last_linear(teacher.network) is None:
            raise ValueError(f"the arm nearest needs a Linear layer, and {architecture} has none; leave the arm out")


def real_config(config: AuditConfig) -> RealConfig:
    """Real images in batches as large as the synthetic ones."""
    made = config.trial.synthesis
    size = made.batch_size if isinstance(made.batch_size, int) else RealConfig().batch_size
    return RealConfig(seed=made.seed, batch_size=size)


def real_images_wanted(config: AuditConfig) -> int:
    """Real images of one trial, in whole batches."""
    real = real_config(config)
    wanted = trial.batches_wanted(config.trial.model_copy(update={"synthesis": real}), reestimates=True)[1]
    return wanted * real.batch_size
