"""What a trial is called, what is known of it before it runs, and what becomes of what it leaves behind."""

import re
import socket
import sys
from collections.abc import Iterable
from typing import Any

import torch

import dfkd_ray
from dfkd_ray import commit, devices, distillation, storage, synthesis
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig, columns_of, stable_hash, versions
from dfkd_ray.storage import Folder
from dfkd_ray.trial import images

TRIAL_ID = re.compile(r"t-[0-9a-f]{12}")
CHECKPOINTS = "checkpoints"
# (pattern, replacement): parts of an error message that differ between two runs that fail for the same reason.
VARYING = (
    (re.compile(r"(Tried to allocate [\d.]+ \w+)\..*"), r"\1"),  # CUDA goes on with what was free and who had the rest
    (re.compile(r"\b0x[0-9a-fA-F]+"), "0x…"),
    (re.compile(r"\b(pid|process|thread)([ =:]+)\d+", re.IGNORECASE), r"\1\2…"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "…"),
    (re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+"), ""),
)


def pinned(config: TrialConfig, teacher: Teacher) -> TrialConfig:
    """The config with the hash of every file that its images depend on beside the teacher's weights.

    These hashes are part of a trial's id and of its synthesis keys. The teacher is open by now, so its name is replaced
    by its public one: from here the config goes into rows, files and other processes. The id does not hold the name.
    `ValueError` where the teacher has no such file, or another than a hash that is there already.
    """
    own, reference = (synthesis.pinned(teacher, one) for one in (config.synthesis, config.reference.synthesis))
    return config.model_copy(
        update={
            "teacher": storage.public_name(config.teacher),
            "synthesis": own,
            "reference": config.reference.model_copy(update={"synthesis": reference}),
        }
    )


def trial_id(config: TrialConfig, teacher: Teacher) -> str:
    """`t-` and 12 hex digits over all that decides a number of the row: teacher, config, versions of the algorithms."""
    fields = config.model_dump(mode="json", exclude={"teacher": True, "device": True})
    return "t-" + stable_hash({"teacher": teacher.hash, "config": fields, "versions": versions()})[:12]


def provenance(config: TrialConfig, teacher: Teacher) -> dict[str, Any]:
    """The columns known before anything has run."""
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
    """Kind and first line of an error, as a row keeps it: without what differs between two runs of the same trial.

    Process numbers, addresses in memory or on the network, free memory and the folders before a file's name go.
    """
    message = str(error).strip() or "no message"
    reason = f"{type(error).__name__}: {storage.without_secrets(message.splitlines()[0])}"
    for pattern, shown in VARYING:
        reason = pattern.sub(shown, reason)
    return reason[:300]


def remove_checkpoints(place: Folder, trial_ids: Iterable[str] | None = None) -> None:
    """Remove what these trials (None: all) have under `checkpoints/` of a place, and nothing else there.

    Ids may come out of a table that somebody else has written: what has not the form of one is left alone, and where
    `checkpoints` is a link nothing is removed.
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
    """Whether a trial leaves a file of that name among its checkpoints."""
    return name == distillation.CHECKPOINT or images.is_own_file(name)
