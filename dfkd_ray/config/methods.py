"""The configs of the synthesis methods, and the table `METHODS` with their properties.

A new method needs three things: its config here, its row in `METHODS`, and the module that the row names. Config
unions, the schema of sweep files, the columns of the table `synthesis`, the estimate of a dry run, checks and help are
derived from the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag

from dfkd_ray.config.adaptive import (
    AdiConfig,
    CmiConfig,
    DaflConfig,
    DfadConfig,
    DfqConfig,
    FastConfig,
    NayerConfig,
    ZsktConfig,
)
from dfkd_ray.config.fields import (
    LARGEST_FLOAT,
    STRICT,
    AutoBatchSize,
    BatchSize,
    Count,
    Name,
    Number,
    Precision,
    Seed,
    Storage,
    Threads,
    Weight,
    method_of,
    validate,
)
from dfkd_ray.config.inversion import DeepInversionConfig
from dfkd_ray.plain import given

RecordKind = Literal["top", "all", "spectral", "spectral_pairs"]  # of activation records; methods in `dfkd_ray.records`


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
    batch_size: AutoBatchSize = Field(
        default=500, description="images made at once; they do not touch each other; auto: halved until they fit"
    )
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


class ShapesConfig(BaseModel):
    """Random overlapping shapes in the teacher's channel mean and standard deviation: a baseline with edges."""

    model_config = STRICT

    method: Literal["shapes"] = "shapes"
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


@dataclass(frozen=True)
class Method:
    """The properties of a synthesis method that other modules use.

    `module` is imported only by processes that make images. Its interface is described in `dfkd_ray.synthesis`. Real
    images have no module: they are injected.
    """

    config: type[BaseModel]
    title: str
    module: str | None
    terms: Mapping[str, str] = field(default_factory=dict)
    """What it measures of a batch, unweighted: name → meaning. Each is a column of the table `synthesis`."""
    cost_fields: tuple[str, ...] = ()
    """Config fields that decide how long a step takes, beside those that all methods share."""
    has_labels: bool = True
    is_data_free: bool = True
    is_stationary: bool = True
    """Whether batch i is a function of (teacher, config, i). Others go by rounds: their config has the fields
    `num_rounds` and `lag`, their module `first_state` and `advance`, their `source` takes the state of a round."""
    looks_at_student: Callable[[Any], bool] = lambda _config: False
    """Whether images of a config depend on the student; where they do, only one trial can use them."""
    passes: Callable[[Any, int], int] = lambda config, _round: getattr(config, "num_steps", 0)
    """How often a batch of (config, round) goes through the teacher, at most; forward and backward are one."""


LABEL, BN = "label loss of the stored images", "BatchNorm statistics term"
TV, L2 = "total variation", "mean squared normalised pixel"
BALANCE, ADVERSARIAL = "minus the entropy of the batch's mean prediction", "student's term: minus its distance"
ACTIVATION = "minus the mean absolute input of the last linear layer"
CONTRASTIVE = "contrastive loss of the kept step"
# What decides the seconds of a step.
OF_INVERSION = ("precision", "parametrisation", "channels_last", "fast")
OF_GENERATOR = ("precision", "num_channels", "channels_last")


def of_adversary(config: Any) -> bool:
    """Whether a config's images depend on the student: they do if its term has a weight."""
    return config.adversarial_weight > 0


def of_generator(config: Any, round_number: int) -> int:
    """Passes of a batch. Round 0 has no student: a generator without another term stays as it is there."""
    own = ("label_weight", "bn_weight", "balance_weight", "activation_weight")
    return config.num_steps if round_number or any(getattr(config, name, 0) for name in own) else 0


ADAPTIVE = partial(Method, is_stationary=False, looks_at_student=of_adversary)
METHODS: dict[str, Method] = {
    "deepinversion": Method(
        DeepInversionConfig,
        "gradient descent until the BatchNorm statistics and the labels fit",
        "dfkd_ray.synthesis.deepinversion",
        terms={"label": LABEL, "bn": BN, "tv": TV, "l2": L2},
        cost_fields=OF_INVERSION,
    ),
    "records": Method(
        RecordsConfig,
        "the same on activation records released with the teacher",
        "dfkd_ray.synthesis.reconstruction",
        terms={"label": LABEL, "bn": BN, "tv": TV, "record": "term of the activation record"},
        cost_fields=("precision", "parametrisation", "channels_last", "record"),
    ),
    "adi": ADAPTIVE(
        AdiConfig,
        "DeepInversion, then rounds of its images moved to where the student fails",
        "dfkd_ray.synthesis.adaptive",
        terms={"label": LABEL, "bn": BN, "tv": TV, "l2": L2, "adversarial": ADVERSARIAL},
        cost_fields=OF_INVERSION,
        passes=lambda config, number: config.adaptive_steps if number else config.num_steps,
    ),
    "dfq": ADAPTIVE(
        DfqConfig,
        "a generator: BatchNorm statistics, sure and balanced classes, against the student",
        "dfkd_ray.synthesis.generative",
        terms={"label": LABEL, "bn": BN, "balance": BALANCE, "adversarial": ADVERSARIAL},
        cost_fields=OF_GENERATOR,
        passes=of_generator,
    ),
    "dafl": Method(
        DaflConfig,
        "a generator: sure and balanced classes, strong features; no BatchNorm needed",
        "dfkd_ray.synthesis.generative",
        terms={"label": LABEL, "balance": BALANCE, "activation": ACTIVATION},
        cost_fields=OF_GENERATOR,
        passes=of_generator,
        is_stationary=False,
    ),
    "dfad": ADAPTIVE(
        DfadConfig,
        "a generator of images on which the student's logits differ; no BatchNorm needed",
        "dfkd_ray.synthesis.generative",
        terms={"adversarial": ADVERSARIAL},
        cost_fields=OF_GENERATOR,
        passes=of_generator,
    ),
    "zskt": ADAPTIVE(
        ZsktConfig,
        "a generator of images on which the student's distribution differs; no BatchNorm needed",
        "dfkd_ray.synthesis.generative",
        terms={"adversarial": ADVERSARIAL},
        cost_fields=OF_GENERATOR,
        passes=of_generator,
    ),
    "cmi": ADAPTIVE(
        CmiConfig,
        "a new generator for each batch, whose images differ from all earlier ones in the teacher's features",
        "dfkd_ray.synthesis.contrastive",
        terms={"label": LABEL, "bn": BN, "adversarial": ADVERSARIAL, "contrastive": CONTRASTIVE},
        cost_fields=(*OF_GENERATOR, "num_negatives", "num_projected"),
        passes=lambda config, _round: config.num_steps * (2 if config.contrastive_weight else 1),
    ),
    "fast": ADAPTIVE(
        FastConfig,
        "a generator that every batch adapts in a few steps",
        "dfkd_ray.synthesis.fast",
        terms={"label": LABEL, "bn": BN, "adversarial": ADVERSARIAL},
        cost_fields=OF_GENERATOR,
    ),
    "nayer": ADAPTIVE(
        NayerConfig,
        "a generator from class embeddings and noisy layers",
        "dfkd_ray.synthesis.nayer",
        terms={"label": LABEL, "bn": BN, "adversarial": ADVERSARIAL},
        cost_fields=OF_GENERATOR,
    ),
    "noise": Method(NoiseConfig, "Gaussian images: the lower baseline", "dfkd_ray.synthesis.noise", has_labels=False),
    "shapes": Method(
        ShapesConfig,
        "random overlapping shapes: a baseline without the teacher",
        "dfkd_ray.synthesis.shapes",
        has_labels=False,
    ),
    "real": Method(RealConfig, "real images: the upper bound, not data-free", None, is_data_free=False),
}


def union_of(methods: Mapping[str, Method], wanted: Callable[[Method], bool] = lambda _method: True) -> Any:
    """The type of a field with the config of one of these methods; the field `method` discriminates."""
    members = [Annotated[row.config, Tag(name)] for name, row in methods.items() if wanted(row)]
    return Annotated[reduce(or_, members), Discriminator(method_of)]


if TYPE_CHECKING:
    SynthesisConfig: TypeAlias = Any
    ReferenceSynthesisConfig: TypeAlias = Any
else:
    SynthesisConfig = union_of(METHODS)
    # The held-out set is always data-free, and the same for every student.
    ReferenceSynthesisConfig = union_of(METHODS, lambda row: row.is_data_free and row.is_stationary)


def parse_synthesis(data: Mapping[str, Any]) -> BaseModel:
    """A synthesis config from its plain data, by its `method`. `ValueError` for an unknown method."""
    method = method_of(data)
    if method not in METHODS:
        raise ValueError(f"synthesis.method: unknown method {given(method)}; expected {', '.join(METHODS)}")
    return validate(METHODS[method].config, data, "synthesis")


def term_columns() -> dict[str, str]:
    """The terms that any method measures → their meaning; they are columns of the table `synthesis`."""
    return {name: f"unweighted {meaning}" for row in METHODS.values() for name, meaning in row.terms.items()}
