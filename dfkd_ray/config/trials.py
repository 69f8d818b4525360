"""The config of a trial: student, distillation, reference set, reconstruction, int8, latency."""

from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from dfkd_ray.config.fields import (
    AUTO,
    STRICT,
    Arguments,
    AutoRate,
    BatchSize,
    Count,
    Name,
    Number,
    Pixels,
    Precision,
    Seed,
    Share,
    Threads,
    Weight,
)
from dfkd_ray.config.methods import METHODS, DeepInversionConfig, ReferenceSynthesisConfig, SynthesisConfig
from dfkd_ray.config.pruning import ACTS_WITH, PruningConfig

OF_FILE = ("weights", "weights_key", "weights_sha256", "keep_zeros")  # fields of a student that starts from a file

# Dotted field → default, of the fields that a dump leaves out where they do not act: what their absence stands for.
LEFT_OUT = {f"pruning.{name}": PruningConfig.model_fields[name].default for name in ACTS_WITH}
LEFT_OUT |= {"pruning.structure": PruningConfig.model_fields["structure"].default}


class ReconstructionConfig(BaseModel):
    """Least squares for the kept weights, layer by layer, before distillation: `dfkd_ray.compression.layerwise`.

    It is left out for another architecture, `pruning.schedule=cubic` and `distillation.bn_mode=frozen`.
    """

    model_config = STRICT

    num_images: Count = Field(
        default=1024,
        ge=0,
        description="half of them as they are, half shifted, flipped and mixed as in distillation; at most four for "
        "each synthetic image; 0 leaves it out",
    )
    ridge: Number = Field(default=0.01, gt=0, description="pull towards the teacher's weights, of the mean input power")
    reselect: bool = Field(
        default=True,
        description="choose anew which weights of each row stay, as many as the criterion keeps there, by the same "
        "least squares (`dfkd_ray.compression.selection`), where this is nearer to the teacher on the reference set; "
        "false keeps those of the criterion",
    )


class QuantisationConfig(BaseModel):
    """int8 after distillation: the student as an ONNX file, measured as it is deployed: `dfkd_ray.trial.quantisation`.

    The student of the trial stays the float one. Without `int8` the section is no part of a trial's id.
    """

    model_config = STRICT

    int8: bool = Field(
        default=False,
        description="write the student as an ONNX file with int8 weights and activations too, and measure it; needs "
        "the extra dfkd_ray[onnx]",
    )
    num_images: Count = Field(
        default=256, ge=2, description="synthetic images that the ranges of activations are taken from"
    )
    distil_above: Number | None = Field(
        default=None,
        ge=0,
        description="distil through fake quantisation where int8 adds more than this to the reference KL, nats; null: "
        "never",
    )
    num_steps: Count = Field(default=100, ge=1, description="optimiser steps of that distillation")
    learning_rate: Number = Field(default=0.005, gt=0, description="its peak SGD learning rate, cosine to zero")

    @field_validator("num_images", "distil_above", "num_steps", "learning_rate")
    @classmethod
    def _acts_with_int8_only(cls, value: Any, info: Any) -> Any:
        name = str(info.field_name)
        if info.data.get("int8") is False and value != cls.model_fields[name].default:
            raise ValueError(f"{name} acts with int8=true only; leave it out or set int8=true")
        return value

    @field_validator("num_steps", "learning_rate")
    @classmethod
    def _acts_with_distil_above_only(cls, value: Any, info: Any) -> Any:
        name = str(info.field_name)
        if info.data.get("distil_above", 0) is None and value != cls.model_fields[name].default:
            raise ValueError(f"{name} acts with distil_above only; leave it out or set distil_above")
        return value


class StudentConfig(BaseModel):
    """What is trained: the pruned teacher, or another architecture. It starts from the teacher's weights, random ones,
    or those of a file.

    The file of `weights` has a network of this architecture, or is a bundle, which names its own.
    """

    model_config = STRICT

    architecture: Name | None = Field(
        default=None,
        description="null: the teacher itself; else a name, timm:NAME, torchvision:NAME or package.module:factory",
    )
    arguments: Arguments = Field(default_factory=dict, description="arguments of the architecture")
    weights: Name | None = Field(
        default=None,
        description="the weights that it starts from: a .safetensors or .pt file, or a bundle's folder or URI; null: "
        "the teacher's, or random ones of another architecture",
    )
    weights_key: Name | None = Field(
        default=None, description="the place in the file of the weights to take, where several sets of them fit"
    )
    weights_sha256: Name | None = Field(
        default=None, description="SHA-256 of that file, or the bundle's hash; filled in before a trial has an id"
    )
    keep_zeros: bool = Field(
        default=True, description="zeros of that file's Conv and Linear weights stay zero; false: they are trained"
    )

    @property
    def is_new(self) -> bool:
        """Whether it starts from random weights."""
        return self.architecture is not None and self.weights is None

    @model_serializer(mode="wrap")
    def _fields_that_act(self, plain: Any) -> dict[str, Any]:
        """Without the fields of a file if there is none: trials from before there were such fields keep their ids."""
        data = plain(self)
        left_out = set(OF_FILE) if self.weights is None else {n for n in OF_FILE if data.get(n, 0) is None}
        return {name: value for name, value in data.items() if name not in left_out}

    @model_validator(mode="after")
    def _fields_can_act(self) -> "StudentConfig":
        if self.architecture is None and self.arguments:
            raise ValueError("arguments are given but no architecture; set student.architecture")
        given = [name for name in OF_FILE[1:] if getattr(self, name) != type(self).model_fields[name].default]
        if self.weights is None and given:
            raise ValueError(f"{given[0]} is of a file, and none is given; set student.weights")
        return self

    @property
    def structure(self) -> "StudentConfig":
        """The architecture alone, without the file."""
        return StudentConfig(architecture=self.architecture, arguments=self.arguments)


LEFT_OUT |= {f"student.{name}": StudentConfig.model_fields[name].default for name in OF_FILE}


class DistillationConfig(BaseModel):
    """Knowledge distillation. Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (the T² factor included)."""

    model_config = STRICT

    seed: Seed = Field(default=0, description="seed of order, augmentation and a new student's weights")
    num_images: Count = Field(default=1024, ge=1, description="distinct images; taken as whole batches, rounded up")
    num_steps: Count = Field(
        default=300,
        ge=0,
        description="optimiser steps; 0: the student as it was before, on the rung nearest the teacher",
    )
    num_passes: Count | None = Field(
        default=None,
        ge=1,
        description="images through the teacher, in synthesis and distillation together; num_steps is what synthesis "
        "leaves of them: methods at equal cost; null: num_steps counts",
    )
    batch_size: BatchSize = Field(default=128)
    learning_rate: AutoRate = Field(  # type: ignore[assignment]  # a number before anything is computed
        default=AUTO,
        description="peak SGD learning rate, cosine to zero; auto: 0.01 with bn_mode=paired, else 0.05",
    )
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
    attention_weight: Weight = Field(
        default=0.0, description="weight of the squared difference of attention maps, where both networks have one"
    )
    bn_mode: Literal["auto", "frozen", "reestimated", "trained", "paired"] = Field(
        default="auto",
        description="BatchNorm: the teacher's statistics, re-estimated ones held fixed, batch statistics, or these, "
        "moved by how the teacher's differ between the batch and its data (`dfkd_ray.pairing`); auto: paired where "
        "channels are removed, else trained",
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
        default=0,
        ge=0,
        description="stop after this many looks without a lower KL divergence on the reference set; 0: never",
    )
    checkpoint_every: Count = Field(
        default=200, ge=1, description="steps between two checkpoints, where a folder is given"
    )
    num_threads: Threads = 2

    @model_validator(mode="after")
    def _one_number_of_steps(self) -> "DistillationConfig":
        if self.num_passes is not None and self.num_steps != type(self).model_fields["num_steps"].default:
            raise ValueError("num_passes sets num_steps; leave num_steps out, or num_passes")
        return self


class ReferenceConfig(BaseModel):
    """The held-out synthetic set on which students are selected: one per teacher, the same for every trial."""

    model_config = STRICT

    num_images: Count = Field(default=256, ge=2)
    synthesis: ReferenceSynthesisConfig = DeepInversionConfig()
    mixed: bool = Field(
        default=True, description="mix the images in pairs; false where a mixture of two inputs has no meaning"
    )
    mixed_with: Literal["images", "shapes"] = Field(
        default="images",
        description="mix them with each other, or with random shapes: students of several synthesis methods are "
        "compared more fairly, since no method has trained on these",
    )

    @field_validator("mixed_with")
    @classmethod
    def _acts_with_mixed_only(cls, value: str, info: Any) -> str:
        if info.data.get("mixed") is False and value != cls.model_fields["mixed_with"].default:
            raise ValueError("mixed_with acts with mixed=true only; leave it out or set mixed=true")
        return value


class LatencyConfig(BaseModel):
    """Seconds per batch of the teacher and of a student with another shape, at the end of a trial: `dfkd_ray.latency`.

    A student with zeros in the teacher's shape computes as many multiplications; it is not measured.
    """

    model_config = STRICT

    runtime: Literal["pytorch", "onnxruntime", "none"] = Field(
        default="pytorch",
        description="PyTorch, on the trial's device; ONNX Runtime, on the CPU; none: not measured",
    )
    num_threads: Threads = Field(default=1, description="on the CPU")
    batch_size: Count = Field(default=1, ge=1, le=4096)
    repeats: Count = Field(default=15, ge=3, le=1000, description="alternating runs of both; medians count")


# Dotted field → what its null stands for in rows that are older than it.
NEWER_FIELDS = {
    "distillation.attention_weight": DistillationConfig.model_fields["attention_weight"].default,
    "distillation.num_passes": None,
    "reference.mixed_with": ReferenceConfig.model_fields["mixed_with"].default,
    "reconstruction.reselect": False,
    "enough_kl": 0.0,
} | {
    f"{section}.{name}": field.default
    for section, model in (("quantisation", QuantisationConfig), ("latency", LatencyConfig))
    for name, field in model.model_fields.items()
}


class TrialConfig(BaseModel):
    """One trial: prune, re-estimate BatchNorm, reconstruct layers, distil, quantise, evaluate."""

    model_config = STRICT

    teacher: Name = Field(
        description="bundle folder or URI, name of a bundled teacher, or a library's network: timm:NAME, hf-hub:…"
    )
    pruning: PruningConfig = PruningConfig()
    student: StudentConfig = StudentConfig()
    synthesis: SynthesisConfig = DeepInversionConfig()
    bn_num_images: Count = Field(
        default=1024, ge=2, description="images for BatchNorm re-estimation, rounded up to batches"
    )
    distillation: DistillationConfig = DistillationConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    enough_kl: Weight = Field(
        default=0.0,
        description="the repair of a pruned network ends where its KL divergence on the reference set is below this: "
        "neither other weights are chosen nor is it trained; 0: all is done",
    )
    quantisation: QuantisationConfig = QuantisationConfig()
    latency: LatencyConfig = LatencyConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def reconstructs(self) -> bool:
        """Whether a student with masks has its layers reconstructed."""
        return (
            self.reconstruction.num_images > 0
            and self.pruning.schedule == "one_shot"
            and self.student.architecture is None
            and self.distillation.bn_mode != "frozen"
        )

    @property
    def reselects(self) -> bool:
        """Whether reconstruction chooses the weights that stay: not of channels, and not where a user's zeros are."""
        acts = self.reconstructs and self.pruning.sparsity > 0 and self.student.weights is None
        return self.reconstruction.reselect and acts and self.pruning.structure != "channels"

    @model_validator(mode="after")
    def _options_can_act(self) -> "TrialConfig":
        method = self.synthesis.method
        if self.distillation.label_weight and not METHODS[method].has_labels:
            raise ValueError(f"distillation.label_weight needs labels; synthesis.method={method} has none")
        if self.pruning.schedule == "cubic" and self.distillation.num_steps == 0:
            raise ValueError("pruning.schedule=cubic prunes during distillation; distillation.num_steps is 0")
        rounds = 1 if METHODS[method].is_stationary else self.synthesis.num_rounds
        if self.distillation.num_passes is None and rounds > max(1, self.distillation.num_steps):
            raise ValueError(
                f"synthesis.num_rounds={rounds} needs a step of distillation each; "
                f"distillation.num_steps is {self.distillation.num_steps}"
            )
        if self.pruning.structure == "channels" and self.pruning.sparsity > 0:
            if self.distillation.feature_weight:
                raise ValueError(
                    "distillation.feature_weight compares inputs of the last linear layer, of which "
                    "pruning.structure=channels removes some; set it to 0"
                )
            if not METHODS[method].is_stationary:
                raise ValueError(
                    f"synthesis.method={method} makes images with the student, whose shape pruning.structure=channels "
                    "changes; use another method"
                )
            if self.pruning.target == "latency" and self.latency.runtime == "none":
                raise ValueError("pruning.target=latency is measured; set latency.runtime=pytorch or onnxruntime")
        new_student = self.student.is_new
        if new_student and self.distillation.bn_mode not in ("auto", "trained"):
            raise ValueError("a student from scratch has no BatchNorm statistics yet; set distillation.bn_mode=trained")
        self.refuse_unpaired()
        return self

    def refuse_unpaired(self) -> None:
        """`ValueError` for paired BatchNorm with another architecture. A student's file may be what says so."""
        if self.student.architecture is not None and self.distillation.bn_mode == "paired":
            raise ValueError("distillation.bn_mode=paired needs a student with the teacher's layers; set it to trained")
