"""The config of a teacher's training."""

from typing import Literal

from pydantic import BaseModel, Field

from dfkd_ray.config.fields import (
    STRICT,
    Arguments,
    BatchSize,
    Count,
    ImageSize,
    Name,
    Number,
    Pixels,
    Precision,
    Seed,
    Threads,
)


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
