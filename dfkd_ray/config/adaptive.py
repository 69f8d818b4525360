"""The configs of the methods that go by rounds: images that answer to the student, and generators.

A round has `batch_size` images or more. With `lag` 0 a round uses the student at the end of the round before, with
`lag` 1 the student one round earlier, so that its images can be made while the student trains.
"""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from dfkd_ray.config.fields import (
    STRICT,
    BatchSize,
    Count,
    Number,
    Pixels,
    Precision,
    Seed,
    Share,
    Storage,
    Threads,
    Weight,
)
from dfkd_ray.config.inversion import DeepInversionConfig, tied_to_teacher


class AdiConfig(DeepInversionConfig):
    """DeepInversion, and in later rounds its images moved to where the student fails.

    Round 0 is the plain method's, shared with its trials. Each later round starts from these images. Source: Yin et al.
    2020, arXiv 1912.08795, section 3.3, with the masked term of Fang et al. 2021, arXiv 2105.08584, equation 8.

    It has the fields of the plain method because it begins with it.
    """

    method: Literal["adi"] = "adi"  # type: ignore[assignment]  # the tag of the union
    num_rounds: Count = Field(default=4, ge=1, description="rounds, the first of them plain")
    lag: Literal[0, 1] = Field(default=0, description="0: the student of the round before; 1: of the one before that")
    adaptive_steps: Count = Field(default=30, ge=1, description="optimiser steps of a batch in a later round")
    adaptive_learning_rate: Number = Field(default=0.05, gt=0, description="Adam learning rate of these steps")
    adversarial_weight: Weight = Field(
        default=1.0, description="weight of the student's term where it has the teacher's class; 0: no student"
    )

    @property
    def plain(self) -> DeepInversionConfig:
        """The config of the images that it starts from."""
        return DeepInversionConfig(**{name: getattr(self, name) for name in set(PLAIN_FIELDS) - {"method"}})


PLAIN_FIELDS = tuple(DeepInversionConfig.model_fields)


class GeneratorConfig(BaseModel):
    """The fields of all methods whose images come from a generator."""

    model_config = STRICT

    seed: Seed = Field(default=0, description="seed of generator and inputs, with the teacher, round and batch index")
    batch_size: BatchSize = Field(default=256, description="images of a step and of a batch; they share a generator")
    num_rounds: Count = Field(
        default=20, ge=1, description="alternations of images and student; images of all rounds so far are used"
    )
    lag: Literal[0, 1] = Field(default=0, description="0: the student of the round before; 1: of the one before that")
    num_inputs: Count = Field(default=256, ge=1, description="size of the generator's input z ~ N(0, 1)")
    num_channels: Count = Field(default=64, ge=1, le=4096, description="channels of the generator")
    precision: Precision = Field(
        default="bfloat16",
        description="of the networks; statistics and losses stay in float32; a CPU without bfloat16 runs in float32",
    )
    channels_last: bool = True
    storage: Storage = Field(
        default="uint8", description="type of a stored image, uint8 over the teacher's pixel range"
    )
    num_threads: Threads = 2


class GenerativeConfig(GeneratorConfig):
    """The fields of the methods that train one generator, round by round, from the teacher and the student."""

    num_steps: Count = Field(default=20, ge=1, description="steps of the generator in each batch of a round")
    learning_rate: Number = Field(default=1e-3, gt=0, description="Adam learning rate of the generator")
    flip: bool = Field(default=True, description="flip the batch left to right in half of the steps")
    jitter: Pixels = Field(default=2, description="largest cyclic shift per step, pixels")


class DfqConfig(GenerativeConfig):
    """A generator that fits the BatchNorm statistics, against the student.

    Source: Choi et al. 2020, arXiv 2005.04136.
    """

    method: Literal["dfq"] = "dfq"
    bn_weight: Weight = Field(default=1.0, description="weight of the BatchNorm statistics term")
    label_weight: Weight = Field(default=1.0, description="weight of cross-entropy to the teacher's own class")
    balance_weight: Weight = Field(default=20.0, description="weight of the classes' balance in a batch")
    adversarial_weight: Weight = Field(default=1.0, description="weight of KL(teacher || student), maximised")


class DaflConfig(GenerativeConfig):
    """A generator of images that the teacher is sure of. Source: Chen et al. 2019, arXiv 1904.01186, equations 2 to 5.

    It does not look at the student, so trials share its images.
    """

    method: Literal["dafl"] = "dafl"
    label_weight: Weight = Field(default=1.0, description="weight of cross-entropy to the teacher's own class")
    activation_weight: Weight = Field(default=0.1, description="weight of the last linear layer's mean input")
    balance_weight: Weight = Field(default=5.0, description="weight of the classes' balance in a batch, in nats")


class DfadConfig(GenerativeConfig):
    """A generator of images on which the logits differ. Source: Fang et al. 2019, arXiv 1912.11006, section 3."""

    method: Literal["dfad"] = "dfad"
    adversarial_weight: Number = Field(default=1.0, gt=0, description="weight of the logits' difference, maximised")


class ZsktConfig(GenerativeConfig):
    """A generator of images on which the distributions differ. Source: Micaelli and Storkey 2019, arXiv 1905.09768.

    The paper's student also learns the teacher's attention maps: set `distillation.attention_weight`.
    """

    method: Literal["zskt"] = "zskt"
    adversarial_weight: Number = Field(default=1.0, gt=0, description="weight of KL(teacher || student), maximised")
    clip_norm: Number = Field(default=5.0, gt=0, description="largest norm of the generator's gradient")


class CmiConfig(GeneratorConfig):
    """Contrastive model inversion: images that differ from all earlier ones.

    Source: Fang et al. 2021, arXiv 2105.08584.
    """

    method: Literal["cmi"] = "cmi"
    num_rounds: Count = Field(default=10, ge=1, description="rounds; each adds its images to the memory bank")
    num_steps: Count = Field(default=200, ge=1, description="optimiser steps per batch")
    learning_rate: Number = Field(
        default=1e-3, gt=0, description="Adam learning rate of generator, its inputs and the projection head"
    )
    bn_weight: Weight = Field(default=1.0, description="weight of the BatchNorm statistics term")
    label_weight: Weight = Field(default=0.5, description="weight of the cross-entropy to balanced labels")
    adversarial_weight: Weight = Field(
        default=0.5, description="weight of the student's divergence where it agrees on the class, from round 1 on"
    )
    contrastive_weight: Weight = Field(default=0.8, description="weight of the contrastive loss; 0: no memory bank")
    temperature: Number = Field(default=0.1, gt=0, description="of the contrastive loss")
    num_projected: Count = Field(
        default=256, ge=1, le=65536, description="width of the projection head's hidden layer and of its output"
    )
    bank_size: Count = Field(
        default=4096, ge=0, description="images whose features the memory bank holds: the newest (the paper's: 40,960)"
    )
    bank_type: Literal["float16", "float32"] = Field(default="float16", description="type of the bank's features")
    num_negatives: Count = Field(
        default=512, ge=0, le=65536, description="rows of the bank drawn per step, at most all (the paper's: 4,096)"
    )
    crop_scale: Share = Field(default=0.25, gt=0, description="smallest share of the image in its local view")
    shift: Pixels = Field(default=4, description="largest shift of the global view, pixels")
    flip: bool = Field(default=True, description="flip half of the images left to right, in each view")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "CmiConfig":
        tied_to_teacher(self.label_weight, self.bn_weight)
        return self


class InnerLoopConfig(GeneratorConfig):
    """The fields of the methods whose batches go on training the generator of their round: Fast and NAYER."""

    label_weight: Weight = Field(default=0.5, description="weight of the label loss")
    bn_weight: Weight = Field(default=10.0, description="weight of the BatchNorm statistics term")
    bn_momentum: Share = Field(
        default=0.9, ge=0, lt=1, description="share of earlier rounds in the statistics that are matched; 0: none"
    )
    adversarial_weight: Weight = Field(
        default=1.33, description="weight of the student's divergence, where it agrees on the class; from round 1 on"
    )
    flip: bool = Field(default=True, description="flip half of the images left to right in each step")
    shift: Pixels = Field(default=4, description="largest shift of an image in each step, pixels")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "InnerLoopConfig":
        tied_to_teacher(self.label_weight, self.bn_weight)
        return self


class FastConfig(InnerLoopConfig):
    """Images by a generator that each batch adapts in a few steps. Source: Fang et al. 2022, arXiv 2112.06253.

    The defaults are the paper's for 10 inner steps on CIFAR-10 and a ResNet-34, with half the channels.
    """

    method: Literal["fast"] = "fast"
    num_steps: Count = Field(default=10, ge=1, description="inner steps of each batch, from the generator of its round")
    learning_rate: Number = Field(
        default=2e-3, gt=0, description="Adam's, of the inner steps; the generator's own is num_steps times as large"
    )
    input_learning_rate: Number = Field(default=0.01, gt=0, description="Adam's, of the generator's inputs")
    reset_round: Count = Field(
        default=0, ge=0, description="round before which the generator's first two layers are drawn anew; 0: never"
    )

    @model_validator(mode="after")
    def _reset_comes(self) -> "FastConfig":
        if self.reset_round >= self.num_rounds and self.reset_round:
            raise ValueError(
                f"reset_round: round {self.reset_round} never comes with num_rounds={self.num_rounds}, they count from "
                "0; give an earlier round, or 0 for never"
            )
        return self


class NayerConfig(InnerLoopConfig):
    """Images by a generator from class embeddings and noisy layers. Source: Tran et al. 2024, arXiv 2310.00258.

    The defaults are the paper's for CIFAR-10 and a ResNet-34, with half the channels and a quarter of the inputs.
    """

    method: Literal["nayer"] = "nayer"
    num_steps: Count = Field(default=30, ge=1, description="steps of each batch, from the generator of its round")
    learning_rate: Number = Field(default=4e-3, gt=0, description="Adam's, of the generator")
    embedding: Literal["classifier", "orthonormal", "one_hot"] = Field(
        default="classifier",
        description="what stands for a class: its row of the teacher's last linear layer, at length 1; or without "
        "knowledge of the classes, random orthonormal vectors, or coordinates",
    )
    generator_life: Count = Field(
        default=10, ge=0, description="rounds after which a new generator takes the old one's place; 0: never"
    )
    num_inputs: Count = Field(default=256, ge=1, description="outputs of the noisy layers")
