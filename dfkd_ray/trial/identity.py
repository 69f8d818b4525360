"""A trial's id, the columns of its row that are known before it runs, its error texts, removal of its checkpoints."""

import re
import socket
import sys
from collections.abc import Iterable
from typing import Any

import torch

import dfkd_ray
from dfkd_ray import batchnorm, checkpoints, commit, devices, storage, synthesis
from dfkd_ray.bundles import Teacher, starts
from dfkd_ray.config import (
    TRIAL_ID,
    DistillationConfig,
    TrialConfig,
    columns_of,
    hashed,
    stable_hash,
    validate,
    versions,
)
from dfkd_ray.config.fields import AUTO
from dfkd_ray.storage import Folder
from dfkd_ray.trial import images, structure

CHECKPOINTS = "checkpoints"
# Chosen on validation images, one start each, after 300 steps, points lost at 0.05 and 0.01 with paired BatchNorm:
# ResNet-20 with half of its channels 2.7 and 2.4, ResNet-18 with a quarter of its multiplications 1.2 and 1.0, VGG-19
# with half of them 1.2 and 1.2 by activations, 5.1 and 5.0 by magnitude.
LEARNING_RATE, LEARNING_RATES = 0.05, {"paired": 0.01}
# (pattern, replacement). They remove from an error message what may differ between two runs with the same error:
# CUDA's memory report, addresses, process ids, network addresses, the folders of a path.
VARYING = (
    (re.compile(r"(Tried to allocate [\d.]+ \w+)\..*"), r"\1"),  # CUDA appends free memory and its users
    (re.compile(r"\b0x[0-9a-fA-F]+"), "0x…"),
    (re.compile(r"\b(pid|process|thread)([ =:]+)\d+", re.IGNORECASE), r"\1\2…"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "…"),
    (re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+"), ""),
)


def pinned(config: TrialConfig, teacher: Teacher) -> TrialConfig:
    """The config with everything that is known only where it runs: hashes of files, and batch sizes for `auto`.

    `num_steps` is set where `num_passes` is given.

    The files are those other than the teacher's weights: activation records, and the weights that a student starts
    from. Hashes and batch sizes are part of the trial's id and of its synthesis keys. The names of the teacher and of
    the student's file are replaced by public names, without secrets, because the config is written to rows and files
    from here on; the id does not depend on the names. `ValueError` if there is no such file, if the config already has
    another hash for it, or if no batch fits.
    """
    own = synthesis.pinned(teacher, config.synthesis, config.device)
    reference = synthesis.pinned(teacher, config.reference.synthesis, config.device, "reference.synthesis")
    return with_num_steps(
        config.model_copy(
            update={
                "teacher": storage.public_name(config.teacher),
                "student": starts.pinned(config.student, teacher),
                "synthesis": own,
                "reference": config.reference.model_copy(update={"synthesis": reference}),
                "distillation": settled(config, teacher),
            }
        )
    )


def may_be_paired(config: TrialConfig) -> bool:
    """Whether BatchNorm is paired with the teacher's where `bn_mode` is auto, if the teacher has any."""
    return structure.applies(config) and config.student.architecture is None


def settled(config: TrialConfig, teacher: Teacher | None) -> DistillationConfig:
    """`distillation` with what its `auto` stands for. `teacher`: None where it does not matter (`may_be_paired`)."""
    kd = config.distillation
    if kd.bn_mode == AUTO:
        is_paired = may_be_paired(config) and teacher is not None and bool(batchnorm.layers(teacher.network))
        kd = kd.model_copy(update={"bn_mode": "paired" if is_paired else "trained"})
    if kd.learning_rate == AUTO:
        kd = kd.model_copy(update={"learning_rate": LEARNING_RATES.get(kd.bn_mode, LEARNING_RATE)})
    return kd


def with_num_steps(config: TrialConfig) -> TrialConfig:
    """The config with the number of steps that `distillation.num_passes` stands for; without that field.

    `ValueError` if synthesis alone takes more, or if another field does not suit that number of steps.
    """
    kd = config.distillation
    if kd.num_passes is None:
        return config
    made = images.synthesis_passes(config)
    num_steps = (kd.num_passes - made) // kd.batch_size
    if num_steps < 1:
        raise ValueError(
            f"distillation.num_passes={kd.num_passes} leaves no step of distillation: synthesis takes {made} images "
            f"through the teacher, and a step {kd.batch_size}; set at least {made + kd.batch_size}"
        )
    config = config.model_copy(
        update={"distillation": kd.model_copy(update={"num_steps": num_steps, "num_passes": None})}
    )
    return validate(TrialConfig, config.model_dump(mode="json"))


def trial_id(config: TrialConfig, teacher: Teacher) -> str:
    """`t-` and 12 hex digits: a hash of everything that determines the results (teacher, config, algorithm versions).

    Left out of the config are the fields that change no result: see `config.hashed`.
    """
    return "t-" + stable_hash({"teacher": teacher.hash, "config": hashed(config), "versions": versions()})[:12]


def provenance(config: TrialConfig, teacher: Teacher) -> dict[str, Any]:
    """The columns of a row that are known before the trial runs."""
    return columns_of(config) | {
        "trial_id": trial_id(config, teacher),
        **versions(),
        "teacher_hash": teacher.hash,
        "teacher_architecture": teacher.info.architecture,
        "real_data": config.synthesis.method == "real",
        "package_version": dfkd_ray.__version__,
        "commit": commit.of_package(),
        "torch_version": torch.__version__,
        "ray_version": getattr(sys.modules.get("ray"), "__version__", None),
        "numerics": devices.numerics_class(devices.resolve(config.device)),
        "host": socket.gethostname(),
    }


def reason_of(error: BaseException) -> str:
    """Type and first line of an error, for a row, without the parts that differ between two runs of a trial.

    Removed are process ids, memory and network addresses, amounts of free memory, and the folders of a path.
    """
    message = str(error).strip() or "no message"
    reason = f"{type(error).__name__}: {storage.without_secrets(message.splitlines()[0])}"
    for pattern, shown in VARYING:
        reason = pattern.sub(shown, reason)
    return reason[:300]


def remove_checkpoints(place: Folder, trial_ids: Iterable[str] | None = None) -> None:
    """Remove the files of these trials (None: of all) under `checkpoints/` of a place, and nothing else.

    Ids may come from a table of unknown origin, so a string that is not a trial id is ignored. If `checkpoints` is a
    symbolic link, nothing is removed.
    """
    folder = place / CHECKPOINTS
    if folder.is_local and folder.path.is_symlink():
        return
    wanted = None if trial_ids is None else {name for name in trial_ids if TRIAL_ID.fullmatch(name)}
    for inner in folder.folders() if wanted is None or len(wanted) > 1 else [folder / name for name in wanted]:
        if TRIAL_ID.fullmatch(inner.name) and (wanted is None or inner.name in wanted):
            inner.clear(is_checkpoint)
    if wanted is None:
        folder.clear(lambda _name: False)


def is_checkpoint(name: str) -> bool:
    """Whether a file name is one of a trial's checkpoint files."""
    return name in (checkpoints.FILE, structure.CHOICE) or images.is_own_file(name)
