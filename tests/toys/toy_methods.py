"""Two synthesis methods that only tests have: one that looks at the student, and one with a term of its own."""

from typing import Literal

from pydantic import BaseModel, Field

from dfkd_ray.config.fields import STRICT, BatchSize, Count, Seed, Storage, Weight
from dfkd_ray.config.methods import Method


class ToyRoundsConfig(BaseModel):
    """Noise, moved by what the student's weights are and by what the rounds before have added up to."""

    model_config = STRICT

    method: Literal["toy_rounds"] = "toy_rounds"
    seed: Seed = 0
    batch_size: BatchSize = 8
    storage: Storage = "uint8"
    num_rounds: Count = Field(default=3, ge=1)
    lag: Literal[0, 1] = 0
    student_weight: Weight = 1.0


class ToyTermConfig(BaseModel):
    """Noise with a term that no other method has."""

    model_config = STRICT

    method: Literal["toy_term"] = "toy_term"
    seed: Seed = 0
    batch_size: BatchSize = 8
    storage: Storage = "uint8"
    sharpness_weight: Weight = 0.5


METHODS = {
    "toy_rounds": Method(
        ToyRoundsConfig,
        "a toy that looks at the student",
        "toy_source",
        terms={"shift": "shift of the images"},
        is_stationary=False,
        looks_at_student=lambda config: config.student_weight > 0,
    ),
    "toy_term": Method(
        ToyTermConfig, "a toy with a term", "toy_source", terms={"sharpness": "sharpness"}, cost_fields=("seed",)
    ),
}
