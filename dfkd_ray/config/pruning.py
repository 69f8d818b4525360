"""The config of pruning."""

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_serializer, model_validator

from dfkd_ray.config.fields import STRICT, Count, Number, Share

FROM_IMAGES = ("wanda", "obs")  # criteria that score weights with the synthetic images

# Fields of pruning, and the structures that they act with.
OF_WEIGHTS = ("criterion", "spare_first", "spare_last")
OF_SCHEDULE = ("schedule", "schedule_end", "schedule_every")
OF_PATTERN = ("pattern",)
OF_CHANNELS = ("target", "importance", "round_to")
ACTS_WITH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OF_WEIGHTS, ("unstructured", "n_of_m")),
    **dict.fromkeys(OF_SCHEDULE, ("unstructured",)),
    **dict.fromkeys(OF_PATTERN, ("n_of_m",)),
    **dict.fromkeys(OF_CHANNELS, ("channels",)),
}


class PruningConfig(BaseModel):
    """Pruning of the student: single weights of its convolution and linear layers become zero, or channels go."""

    model_config = STRICT

    structure: Literal["unstructured", "n_of_m", "channels"] = Field(
        default="unstructured",
        description="zeros anywhere; zeros in a pattern that keeps N of M neighbours (2:4); or whole channels go, so "
        "that the network is smaller",
    )
    criterion: Literal["global_magnitude", "uniform", "lamp", "erk", "wanda", "obs"] = Field(
        default="lamp",
        description="what is pruned first: smallest |w| overall, or per layer (uniform or ERK shares), or lowest LAMP "
        "score of |w|, or of Wanda or OBS scores from the synthetic images",
    )
    sparsity: Number = Field(
        default=0.75,
        ge=0,
        lt=1,
        description="share of zeros over all Conv and Linear weights; n_of_m: 1 - N / M; channels: share of "
        "the target that is removed",
    )
    schedule: Literal["one_shot", "cubic"] = Field(
        default="one_shot", description="all at once before distillation, or cubic during it (Zhu and Gupta 2017)"
    )
    schedule_end: Share = Field(
        default=0.5, gt=0, description="cubic: share of the distillation steps until full sparsity"
    )
    schedule_every: Count = Field(default=10, ge=1, description="cubic: steps between two prunings")
    spare_first: bool = Field(default=False, description="leave the first convolution dense")
    spare_last: bool = Field(default=False, description="leave the last linear layer dense")
    pattern: Literal["2:4", "1:4", "4:8"] = Field(
        default="2:4",
        description="n_of_m: weights kept of so many neighbours along a layer's inputs: the largest, or those of the "
        "highest Wanda or OBS scores",
    )
    target: Literal["parameters", "macs", "latency"] = Field(
        default="parameters",
        description="channels: what sparsity is the removed share of; macs: multiplications; latency: the seconds of a "
        "batch, measured where the trial runs (section latency), so that another machine removes other channels",
    )
    importance: Literal["magnitude", "batchnorm_scale", "activations"] = Field(
        default="activations",
        description="channels: lowest first by weights, by BatchNorm's scales, or by what the synthetic images show",
    )
    round_to: Count = Field(
        default=1, ge=1, le=1024, description="channels: a layer keeps a multiple of this number, for fast kernels"
    )

    @model_serializer(mode="wrap")
    def _fields_that_act(self, plain: Any) -> dict[str, Any]:
        """Without the fields that cannot act: trials from before there was a structure keep their ids."""
        left_out = {name for name, structures in ACTS_WITH.items() if self.structure not in structures}
        if self.structure == "unstructured":
            left_out.add("structure")
        return {name: value for name, value in plain(self).items() if name not in left_out}

    @field_validator(*ACTS_WITH)
    @classmethod
    def _acts_with_one_structure(cls, value: Any, info: Any) -> Any:
        name = str(info.field_name)
        needed = ACTS_WITH[name]
        if info.data.get("structure", needed[0]) not in needed and value != cls.model_fields[name].default:
            named = " or ".join(needed)
            raise ValueError(f"{name} acts with structure={named} only; leave it out or set structure={needed[0]}")
        return value

    @field_validator("schedule_end", "schedule_every")
    @classmethod
    def _acts_with_cubic_only(cls, value: float | int, info: Any) -> float | int:
        name = str(info.field_name)
        if info.data.get("schedule") == "one_shot" and value != cls.model_fields[name].default:
            raise ValueError(f"{name} acts with schedule=cubic only; leave it out or set schedule=cubic")
        return value

    @property
    def kept_of(self) -> tuple[int, int]:
        """The pattern: weights kept, of so many neighbours."""
        kept, neighbours = map(int, self.pattern.split(":"))
        return kept, neighbours

    @model_validator(mode="after")
    def _a_pattern_has_its_sparsity(self) -> "PruningConfig":
        kept, neighbours = self.kept_of
        wanted = 1 - kept / neighbours
        if self.structure == "n_of_m" and self.criterion not in ("lamp", *FROM_IMAGES):
            raise ValueError(
                f"criterion={self.criterion} says how many weights each layer loses, and structure=n_of_m says it too; "
                "leave it out, or set criterion=wanda or obs"
            )
        if self.structure == "n_of_m" and self.sparsity not in (0, wanted):
            raise ValueError(
                f"structure=n_of_m with pattern={self.pattern} has sparsity {wanted:g}, not {self.sparsity:g}; set "
                f"sparsity={wanted:g}"
            )
        return self

    @model_validator(mode="after")
    def _scores_from_images_are_taken_once(self) -> "PruningConfig":
        if self.criterion in FROM_IMAGES and self.schedule == "cubic":
            raise ValueError(f"criterion={self.criterion} scores the dense network once; set schedule=one_shot")
        return self
