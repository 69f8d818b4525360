"""Every option, as frozen pydantic models: one place for names, ranges, units and defaults.

A file plus `--set a.b=c` becomes one dict, validated once; all errors come at once, one line each with the path.
Types and bounds of fields, and the validation, are in `fields`; the reading is in `parsing`.
Imports pydantic and nothing heavy, so that `--help` and validation need no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from dfkd_ray.config.fields import (
    LARGEST_FLOAT,
    STRICT,
    Arguments,
    BatchSize,
    Count,
    ImageSize,
    Name,
    Number,
    Pixels,
    Seed,
    Share,
    Threads,
    Weight,
    method_of,
    validate,
)
from dfkd_ray.config.fields import field_paths as field_paths
from dfkd_ray.config.fields import nested_models as nested_models
from dfkd_ray.config.parsing import parse_overrides as parse_overrides
from dfkd_ray.config.parsing import read_yaml as read_yaml
from dfkd_ray.plain import given
from dfkd_ray.plain import with_overrides as with_overrides

# Versions of the algorithms. They are part of keys and ids: what another version has made is made again, not found.
# Raise the first with a change after which equal synthesis configs give other images (a method, its seeds, how images
# are stored); the second with one after which equal trials on equal images give other numbers (pruning, BatchNorm
# re-estimation, distillation, evaluation). Not with a config field that is new: that changes keys and ids by itself.
SYNTHESIS_VERSION = 1
TRIAL_VERSION = 1

Precision = Literal["bfloat16", "tf32", "float32"]
Storage = Literal["uint8", "float16", "float32"]
RecordKind = Literal["top", "all", "spectral", "spectral_pairs"]  # of activation records; methods in `dfkd_ray.records`


class DeepInversionConfig(BaseModel):
    """Images by gradient descent on the teacher. Source: Yin et al. 2020, arXiv 1912.08795, equations 1 to 4."""

    model_config = STRICT

    method: Literal["deepinversion"] = "deepinversion"
    seed: Seed = Field(default=0, description="seed of every batch, together with the teacher and the batch index")
    batch_size: BatchSize = Field(default=256, description="images per batch; they share their BatchNorm statistics")
    num_steps: Count = Field(default=60, ge=1, description="optimiser steps per batch")
    parametrisation: Literal["pyramid", "pixel"] = Field(
        default="pyramid",
        description="what Adam moves: a sum of images at halved resolutions, or the pixels themselves",
    )
    learning_rate: Number = Field(default=0.1, gt=0, description="Adam learning rate, in units of normalised pixels")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="learning rate over the steps")
    label_loss: Literal["cross_entropy", "entropy"] = Field(
        default="cross_entropy", description="cross-entropy to balanced labels, or entropy of the teacher's own output"
    )
    label_weight: Weight = Field(default=1.0, description="weight of the label loss")
    bn_weight: Weight = Field(default=0.2, description="weight of the BatchNorm statistics term")
    bn_first_multiplier: Weight = Field(default=1.0, description="extra factor on the first BatchNorm layer's term")
    tv_weight: Weight = Field(
        default=0.01, description="weight of total variation, mean-reduced (free of batch and resolution)"
    )
    l2_weight: Weight = Field(default=0.0, description="weight of the mean squared normalised pixel")
    jitter: Pixels = Field(default=2, description="largest cyclic shift per step, pixels")
    flip: bool = Field(default=True, description="flip the batch left to right in half of the steps")
    precision: Precision = Field(
        default="bfloat16", description="of the network; statistics and images stay in float32"
    )
    channels_last: bool = True
    compile: bool = Field(
        default=False, description="torch.compile the network; without a compiler it is said and left out"
    )
    fast: bool = Field(default=False, description="CUDA: autotuned, non-deterministic kernels")
    plateau_patience: Count = Field(
        default=0,
        ge=0,
        description="stop a batch when the loss has not improved for this many checks (every 25 steps); 0: never",
    )
    storage: Storage = Field(
        default="uint8", description="type of a stored image, uint8 over the teacher's pixel range"
    )
    num_threads: Threads = 2

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "DeepInversionConfig":
        if not self.label_weight and not self.bn_weight:
            raise ValueError("label_weight and bn_weight are both 0: nothing ties the images to the teacher")
        return self


class RecordsConfig(BaseModel):
    """Images from activation records released with the teacher. Source: Lopes et al. 2017, arXiv 1710.07535, section 4.

    The defaults are the paper's for 28x28 and 32x32 grey images; for CelebA it starts at N(0.44, 0.29), lr 0.05.
    """

    model_config = STRICT

    method: Literal["records"] = "records"
    record: RecordKind = Field(default="spectral_pairs", description="which of the teacher's records")
    record_sha256: Name | None = Field(
        default=None, description="of the record's file; null: whatever lies in the bundle, filled in before a trial"
    )
    seed: Seed = Field(default=0, description="seed of every batch, together with the teacher and the batch index")
    batch_size: BatchSize = Field(default=500, description="images made at once; they do not touch each other")
    num_steps: Count = Field(default=1000, ge=1, description="optimiser steps per batch")
    learning_rate: Number = Field(default=0.07, gt=0, description="Adam learning rate, in pixel units")
    schedule: Literal["cosine", "constant"] = Field(default="constant", description="learning rate over the steps")
    init_mean: Number = Field(
        default=0.15, ge=-LARGEST_FLOAT, description="images start as N(init_mean, init_std), in pixel units"
    )
    init_std: Number = Field(default=0.1, ge=0)
    record_weight: Number = Field(default=1.0, gt=0, description="weight of the record's term")
    residual: bool = Field(
        default=True,
        description="spectral records: also what lies outside the kept coefficients counts (the paper's loss)",
    )
    dropout: Literal["off", "frozen"] = Field(
        default="off",
        description="dropout filters of the teacher: none, or one drawn per batch and kept (the paper's variant)",
    )
    bn_weight: Weight = Field(default=0.0, description="DeepInversion's term beside it, for a teacher that has both")
    label_weight: Weight = Field(default=0.0, description="cross-entropy to the labels; an extra, not in the paper")
    tv_weight: Weight = Field(default=0.0, description="total variation, mean-reduced; an extra, not in the paper")
    clamp: bool = Field(
        default=False, description="keep pixels in their range at every step; an extra, not in the paper"
    )
    parametrisation: Literal["pixel", "pyramid"] = Field(
        default="pixel", description="pixels, or a sum of images at halved resolutions (an image prior; an extra)"
    )
    precision: Precision = Field(default="float32", description="of the network; the record's term stays in float32")
    channels_last: bool = True
    storage: Storage = Field(default="uint8", description="type of a stored image")
    num_threads: Threads = 2


class NoiseConfig(BaseModel):
    """Gaussian images of the teacher's channel mean and standard deviation: the lower baseline."""

    model_config = STRICT

    method: Literal["noise"] = "noise"
    seed: Seed = Field(default=0)
    batch_size: BatchSize = Field(default=256)
    storage: Storage = "uint8"


class RealConfig(BaseModel):
    """Real training images, injected by the command line: the upper bound. Not data-free; marked in every row."""

    model_config = STRICT

    method: Literal["real"] = "real"
    seed: Seed = Field(default=0, description="which images, and their order")
    batch_size: BatchSize = Field(default=256)
    storage: Storage = "uint8"


SynthesisConfig = Annotated[
    Annotated[DeepInversionConfig, Tag("deepinversion")]
    | Annotated[RecordsConfig, Tag("records")]
    | Annotated[NoiseConfig, Tag("noise")]
    | Annotated[RealConfig, Tag("real")],
    Discriminator(method_of),
]


# The held-out set is data-free whatever the trial's own images are.
ReferenceSynthesisConfig = Annotated[
    Annotated[DeepInversionConfig, Tag("deepinversion")]
    | Annotated[RecordsConfig, Tag("records")]
    | Annotated[NoiseConfig, Tag("noise")],
    Discriminator(method_of),
]


SYNTHESIS_CONFIGS: dict[str, type[BaseModel]] = {
    "deepinversion": DeepInversionConfig,
    "records": RecordsConfig,
    "noise": NoiseConfig,
    "real": RealConfig,
}


def parse_synthesis(data: Mapping[str, Any]) -> BaseModel:
    """A synthesis config out of its plain data, by its method. `ValueError` for a method that there is not."""
    method = method_of(data)
    if method not in SYNTHESIS_CONFIGS:
        raise ValueError(f"synthesis.method: unknown method {given(method)}; expected {', '.join(SYNTHESIS_CONFIGS)}")
    return validate(SYNTHESIS_CONFIGS[method], data, "synthesis")


class PruningConfig(BaseModel):
    """Unstructured pruning of the student's convolution and linear weights."""

    model_config = STRICT

    criterion: Literal["global_magnitude", "uniform", "lamp"] = Field(
        default="global_magnitude",
        description="what is pruned first: smallest |w| overall, per layer, or by LAMP score",
    )
    sparsity: Number = Field(default=0.75, ge=0, lt=1, description="share of zeros over all Conv and Linear weights")
    schedule: Literal["one_shot", "cubic"] = Field(
        default="one_shot", description="all at once before distillation, or cubic during it (Zhu and Gupta 2017)"
    )
    schedule_end: Share = Field(
        default=0.5, gt=0, description="cubic: share of the distillation steps until full sparsity"
    )
    schedule_every: Count = Field(default=10, ge=1, description="cubic: steps between two prunings")
    spare_first: bool = Field(default=False, description="leave the first convolution dense")
    spare_last: bool = Field(default=False, description="leave the last linear layer dense")

    @field_validator("schedule_end", "schedule_every")
    @classmethod
    def _acts_with_cubic_only(cls, value: float | int, info: Any) -> float | int:
        name = str(info.field_name)
        if info.data.get("schedule") == "one_shot" and value != cls.model_fields[name].default:
            raise ValueError(f"{name} acts with schedule=cubic only; leave it out or set schedule=cubic")
        return value


class StudentConfig(BaseModel):
    """What is trained: the pruned teacher, or another architecture from scratch."""

    model_config = STRICT

    architecture: Name | None = Field(
        default=None, description="null: the teacher itself; else a name or package.module:factory"
    )
    arguments: Arguments = Field(default_factory=dict, description="arguments of the architecture")

    @model_validator(mode="after")
    def _arguments_need_an_architecture(self) -> "StudentConfig":
        if self.architecture is None and self.arguments:
            raise ValueError("arguments are given but no architecture; set student.architecture")
        return self


class DistillationConfig(BaseModel):
    """Knowledge distillation. Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (the T² factor included)."""

    model_config = STRICT

    seed: Seed = Field(default=0, description="seed of order, augmentation and a new student's weights")
    num_images: Count = Field(default=1024, ge=1, description="distinct images; taken as whole batches, rounded up")
    num_steps: Count = Field(
        default=300, ge=0, description="optimiser steps; 0 leaves the student as BatchNorm re-estimation left it"
    )
    batch_size: BatchSize = Field(default=128)
    learning_rate: Number = Field(default=0.05, gt=0, description="peak SGD learning rate, cosine to zero")
    warmup: Number = Field(default=0.05, ge=0, lt=1, description="share of the steps with a linear rise")
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    weight_decay: Number = Field(default=5e-4, ge=0)
    clip_norm: Number = Field(default=1.0, gt=0, description="largest norm of the gradient")
    temperature: Number = Field(default=4.0, gt=0, description="softmax temperature of teacher and student")
    kl_weight: Weight = 1.0
    label_weight: Weight = Field(default=0.0, description="weight of cross-entropy to the synthesis labels")
    feature_weight: Weight = Field(
        default=0.0, description="weight of the mean squared error of the last linear layer's input"
    )
    bn_mode: Literal["frozen", "reestimated", "trained"] = Field(
        default="trained",
        description="BatchNorm: the teacher's statistics, re-estimated ones held fixed, or batch statistics",
    )
    shift: Pixels = Field(default=2, description="augmentation: largest shift with zero padding, pixels")
    flip: bool = Field(default=True, description="augmentation: left to right, each image with probability 1/2")
    mixup: Share = Field(
        default=0.5, ge=0, description="augmentation: share of images mixed with another, weight U(0, 1)"
    )
    precision: Precision = "bfloat16"
    fast: bool = Field(default=False, description="CUDA: autotuned, non-deterministic kernels")
    eval_every: Count = Field(default=100, ge=1, description="steps between two looks at the reference set")
    patience: Count = Field(
        default=0, ge=0, description="stop after this many looks without a better agreement; 0: never"
    )
    checkpoint_every: Count = Field(
        default=200, ge=1, description="steps between two checkpoints, where a folder is given"
    )
    num_threads: Threads = 2


class ReferenceConfig(BaseModel):
    """The held-out synthetic set on which students are selected: one per teacher, the same for every trial."""

    model_config = STRICT

    num_images: Count = Field(default=256, ge=2)
    synthesis: ReferenceSynthesisConfig = DeepInversionConfig()


class TrialConfig(BaseModel):
    """One trial: prune, re-estimate BatchNorm, distil, evaluate."""

    model_config = STRICT

    teacher: Name = Field(description="bundle folder or URI, or the name of a bundled teacher")
    pruning: PruningConfig = PruningConfig()
    student: StudentConfig = StudentConfig()
    synthesis: SynthesisConfig = DeepInversionConfig()
    bn_num_images: Count = Field(
        default=1024, ge=2, description="images for BatchNorm re-estimation, rounded up to batches"
    )
    distillation: DistillationConfig = DistillationConfig()
    reference: ReferenceConfig = ReferenceConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _options_can_act(self) -> "TrialConfig":
        if self.distillation.label_weight and self.synthesis.method == "noise":
            raise ValueError("distillation.label_weight needs labels; synthesis.method=noise has none")
        if self.pruning.schedule == "cubic" and self.distillation.num_steps == 0:
            raise ValueError("pruning.schedule=cubic prunes during distillation; distillation.num_steps is 0")
        new_student = self.student.architecture is not None
        if new_student and self.distillation.bn_mode != "trained":
            raise ValueError("a student from scratch has no BatchNorm statistics yet; set distillation.bn_mode=trained")
        return self


class TeacherTrainingConfig(BaseModel):
    """Training of a teacher on real images: SGD with OneCycle learning rate."""

    model_config = STRICT

    architecture: Name
    arguments: Arguments = Field(default_factory=dict)
    dataset: Name
    image_size: ImageSize | None = Field(default=None, description="pixels; null: the data set's own, 28 padded to 32")
    num_epochs: Count = Field(default=20, ge=1)
    batch_size: BatchSize = Field(default=256)
    learning_rate: Number = Field(default=0.2, gt=0, description="peak of OneCycle, for the whole batch")
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    weight_decay: Number = Field(default=5e-4, ge=0)
    shift: Pixels = Field(default=2, description="largest shift with zero padding, pixels")
    flip: bool = True
    num_validation: Count = Field(
        default=0, ge=0, description="training images held out of training (the last ones of a seeded shuffle)"
    )
    precision: Precision = "bfloat16"
    seed: Seed = Field(default=0)
    num_threads: Threads = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted names; empty mappings and lists become JSON text."""
    columns: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            columns |= flat(value, f"{prefix}{key}.")
        else:
            columns[prefix + key] = json.dumps(value) if isinstance(value, Mapping | list) else value
    return columns


def columns_of(config: TrialConfig) -> dict[str, Any]:
    """Dotted field → value: the config's columns in a table. A new student's arguments are one column, as JSON."""
    columns = flat(config.model_dump(mode="json", exclude={"student": {"arguments"}}))
    return columns | {"student.arguments": json.dumps(config.student.arguments, sort_keys=True)}


def stable_hash(data: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of plain data: the same in every process and on every machine."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(config: BaseModel) -> str:
    """Hash of every field of a config: equal configs, equal hashes."""
    return stable_hash(config.model_dump(mode="json"))


def follows(field: str) -> bool:
    """Whether a (dotted) field follows from others, and so tells a reader nothing: the hash of an activation record."""
    return field.rpartition(".")[2] == "record_sha256"


def versions() -> dict[str, int]:
    """The versions of the algorithms, as the columns of a row."""
    return {"trial_version": TRIAL_VERSION, "synthesis_version": SYNTHESIS_VERSION}


def seeds_key(teacher_hash: str, config: BaseModel, domain: str = "train") -> str:
    """Hash of the teacher and every field that changes pixels: what the seeds of batches come from.

    `domain` separates the seeds of the held-out reference set from those of training images. The algorithm's version
    is not in it: to raise that alone changes no image.
    """
    return stable_hash({"teacher": teacher_hash, "config": config.model_dump(mode="json"), "domain": domain})


def synthesis_key(teacher_hash: str, config: BaseModel, domain: str = "train") -> str:
    """Hash of all that decides pixels, `SYNTHESIS_VERSION` included (design: one key, one sequence of batches)."""
    return stable_hash({"of": seeds_key(teacher_hash, config, domain), "version": SYNTHESIS_VERSION})
