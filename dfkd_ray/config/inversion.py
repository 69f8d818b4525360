"""The config of DeepInversion."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from dfkd_ray.config.fields import (
    AUTO,
    STRICT,
    AutoBatchSize,
    AutoWeight,
    Count,
    Number,
    Pixels,
    Precision,
    Seed,
    Storage,
    Threads,
    Weight,
)


class DeepInversionConfig(BaseModel):
    """Images by gradient descent on the teacher. Source: Yin et al. 2020, arXiv 1912.08795, equations 1 to 4."""

    model_config = STRICT

    method: Literal["deepinversion"] = "deepinversion"
    seed: Seed = Field(default=0, description="seed of every batch, together with the teacher and the batch index")
    batch_size: AutoBatchSize = Field(
        default=256,
        description="images per batch; they share their BatchNorm statistics; auto: the default, halved until it fits",
    )
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
    bn_weight: AutoWeight = Field(  # type: ignore[assignment]  # a number before anything is computed
        default=AUTO,
        description="weight of the BatchNorm statistics term; auto: by the size of the teacher's statistics "
        "(`dfkd_ray.synthesis.deepinversion`)",
    )
    bn_first_multiplier: Weight = Field(default=1.0, description="extra factor on the first BatchNorm layer's term")
    tv_weight: Weight = Field(
        default=0.01, description="weight of total variation, mean-reduced (free of batch and resolution)"
    )
    l2_weight: Weight = Field(default=0.0, description="weight of the mean squared normalised pixel")
    jitter: Pixels = Field(default=2, description="largest cyclic shift per step, pixels")
    flip: bool = Field(default=True, description="flip the batch left to right in half of the steps")
    precision: Precision = Field(
        default="bfloat16",
        description="of the network; statistics and images stay in float32; a CPU without bfloat16 runs it in float32",
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
        tied_to_teacher(self.label_weight, self.bn_weight)
        return self


def tied_to_teacher(label_weight: float, bn_weight: float | str) -> None:
    """`ValueError` if nothing that is minimised depends on the teacher in every round."""
    if not label_weight and not bn_weight:
        raise ValueError("label_weight and bn_weight are both 0: nothing ties the images to the teacher")
