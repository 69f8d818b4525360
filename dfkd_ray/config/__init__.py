"""All options as frozen pydantic models: names, ranges, units and defaults.

A config file and assignments `a.b=c` are merged into one dict and validated once. All errors are reported together,
one line each, with the field's path. Imports pydantic but not torch, so that help and validation are fast.
"""

from dfkd_ray.config.adaptive import AdiConfig, CmiConfig, FastConfig, NayerConfig
from dfkd_ray.config.efforts import EFFORTS, Effort, with_effort
from dfkd_ray.config.fields import STRICT, field_paths, nested_models, validate
from dfkd_ray.config.hashes import (
    OF_TEACHER,
    SYNTHESIS_VERSION,
    TRIAL_ID,
    TRIAL_VERSION,
    columns_of,
    config_hash,
    flat,
    follows,
    hashed,
    round_key,
    seeds_key,
    stable_hash,
    synthesis_key,
    versions,
)
from dfkd_ray.config.inversion import DeepInversionConfig
from dfkd_ray.config.methods import (
    METHODS,
    Method,
    NoiseConfig,
    RealConfig,
    RecordKind,
    RecordsConfig,
    ShapesConfig,
    parse_synthesis,
)
from dfkd_ray.config.parsing import parse_overrides, read_yaml
from dfkd_ray.config.pruning import FROM_IMAGES, PruningConfig
from dfkd_ray.config.training import TeacherTrainingConfig
from dfkd_ray.config.trials import (
    LEFT_OUT,
    NEWER_FIELDS,
    DistillationConfig,
    LatencyConfig,
    QuantisationConfig,
    ReferenceConfig,
    StudentConfig,
    TrialConfig,
)
from dfkd_ray.plain import with_overrides

__all__ = [
    "EFFORTS",
    "FROM_IMAGES",
    "LEFT_OUT",
    "METHODS",
    "NEWER_FIELDS",
    "OF_TEACHER",
    "STRICT",
    "SYNTHESIS_VERSION",
    "TRIAL_ID",
    "TRIAL_VERSION",
    "AdiConfig",
    "CmiConfig",
    "DeepInversionConfig",
    "DistillationConfig",
    "Effort",
    "FastConfig",
    "LatencyConfig",
    "Method",
    "NayerConfig",
    "NoiseConfig",
    "PruningConfig",
    "QuantisationConfig",
    "RealConfig",
    "RecordKind",
    "RecordsConfig",
    "ReferenceConfig",
    "ShapesConfig",
    "StudentConfig",
    "TeacherTrainingConfig",
    "TrialConfig",
    "columns_of",
    "config_hash",
    "field_paths",
    "flat",
    "follows",
    "hashed",
    "nested_models",
    "parse_overrides",
    "parse_synthesis",
    "read_yaml",
    "round_key",
    "seeds_key",
    "stable_hash",
    "synthesis_key",
    "validate",
    "versions",
    "with_effort",
    "with_overrides",
]
