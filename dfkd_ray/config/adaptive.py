"""The configs of the synthesis methods that train an image generator in rounds, beside the student."""

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


class FastConfig(BaseModel):
    """Images by a generator that each batch adapts in a few steps. Source: Fang et al. 2022, arXiv 2112.06253.

    The defaults are the paper's for 10 inner steps on CIFAR-10 and a ResNet-34, with half the channels.
    """

    model_config = STRICT

    method: Literal["fast"] = "fast"
    seed: Seed = Field(default=0, description="seed of the generator and every batch, with the teacher and the index")
    batch_size: BatchSize = Field(default=256, description="images per batch; they share their BatchNorm statistics")
    num_rounds: Count = Field(default=10, ge=1, description="rounds; the generator takes one step after each")
    lag: Literal[0, 1] = Field(
        default=0, description="0: a round uses the student at its beginning; 1: that of one round before"
    )
    num_steps: Count = Field(default=10, ge=1, description="inner steps of each batch, from the generator of its round")
    learning_rate: Number = Field(
        default=2e-3, gt=0, description="Adam's, of the inner steps; the generator's own is num_steps times as large"
    )
    input_learning_rate: Number = Field(default=0.01, gt=0, description="Adam's, of the generator's inputs")
    num_inputs: Count = Field(default=256, ge=1, le=10**5, description="inputs of the generator")
    num_channels: Count = Field(default=64, ge=1, le=10**4, description="channels of the generator's widest layers")
    label_weight: Weight = Field(default=0.5, description="weight of the label loss")
    bn_weight: Weight = Field(default=10.0, description="weight of the BatchNorm statistics term")
    bn_momentum: Share = Field(
        default=0.9, ge=0, lt=1, description="share of earlier rounds in the statistics that are matched; 0: none"
    )
    adversarial_weight: Weight = Field(
        default=1.33, description="weight of the student's divergence, where it agrees on the class; from round 1 on"
    )
    reset_round: Count = Field(
        default=0, ge=0, description="round before which the generator's first two layers are drawn anew; 0: never"
    )
    flip: bool = Field(default=True, description="flip half of the images left to right in each step")
    shift: Pixels = Field(default=4, description="largest shift of an image in each step, pixels")
    precision: Precision = Field(default="bfloat16", description="of the networks; statistics stay in float32")
    channels_last: bool = True
    storage: Storage = Field(default="uint8", description="type of a stored image")
    num_threads: Threads = 2

    @model_validator(mode="after")
    def _valid(self) -> "FastConfig":
        tied_to_teacher(self.label_weight, self.bn_weight)
        if self.reset_round >= self.num_rounds and self.reset_round:
            raise ValueError(
                f"reset_round: round {self.reset_round} never comes with num_rounds={self.num_rounds}, they count from "
                "0; give an earlier round, or 0 for never"
            )
        return self


class NayerConfig(BaseModel):
    """Images by a generator from class embeddings and noisy layers. Source: Tran et al. 2024, arXiv 2310.00258.

    The defaults are the paper's for CIFAR-10 and a ResNet-34, with half the channels and a quarter of the inputs.
    """

    model_config = STRICT

    method: Literal["nayer"] = "nayer"
    seed: Seed = Field(default=0, description="seed of the generator and every batch, with the teacher and the index")
    batch_size: BatchSize = Field(default=256, description="images per batch; they share their BatchNorm statistics")
    num_rounds: Count = Field(default=10, ge=1, description="rounds; the generator is carried from one to the next")
    lag: Literal[0, 1] = Field(
        default=0, description="0: a round uses the student at its beginning; 1: that of one round before"
    )
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
    num_inputs: Count = Field(default=256, ge=1, le=10**5, description="outputs of the noisy layers")
    num_channels: Count = Field(default=64, ge=1, le=10**4, description="channels of the generator's widest layers")
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
    precision: Precision = Field(default="bfloat16", description="of the networks; statistics stay in float32")
    channels_last: bool = True
    storage: Storage = Field(default="uint8", description="type of a stored image")
    num_threads: Threads = 2

    @model_validator(mode="after")
    def _valid(self) -> "NayerConfig":
        tied_to_teacher(self.label_weight, self.bn_weight)
        return self


def tied_to_teacher(label_weight: float, bn_weight: float) -> None:
    """`ValueError` if nothing that is minimised depends on the teacher in every round."""
    if not label_weight and not bn_weight:
        raise ValueError("label_weight and bn_weight are both 0: nothing ties the images to the teacher")
