"""The rungs of a trial, the stages at which a network is measured (teacher, pruned, …): names, labels, columns.

A new rung is added here and measured in `trial`; tables, figures and the printed ladder follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfkd_ray.text import is_null


@dataclass(frozen=True)
class Rung:
    """One rung. `name` is the stem of its columns; `how` describes what has been done to the network."""

    name: str
    label: str
    heading: str
    how: str
    accuracy_meaning: str
    agreement_meaning: str | None = None
    look: tuple[tuple[str, Any], ...] = ()
    """Colour and marker in figures; the colours also differ in lightness."""
    rank: int = 0
    """In a narrow table the columns of the highest rank are left out first."""

    @property
    def accuracy(self) -> str:
        """The column of its test accuracy."""
        return f"{self.name}_accuracy"

    @property
    def agreement(self) -> str | None:
        """The column of its agreement with the teacher; the teacher has none."""
        if self is RECOVERED:  # what trials are ranked by
            return "agreement"
        return None if self.agreement_meaning is None else f"{self.name}_agreement"


TEACHER = Rung("teacher", "teacher", "teacher", "as it is", "test accuracy in [0, 1]; null without test data", rank=4)
PRUNED = Rung(
    "pruned",
    "pruned",
    "pruned",
    "after one-shot pruning",
    "after one-shot pruning",
    "share of equal argmax with the teacher on the reference set",
    (("color", "#8b95a1"), ("marker", "v"), ("linestyle", ":")),
    rank=1,
)
BN_REESTIMATED = Rung(
    "bn_reestimated",
    "BN re-estimated",
    "BN",
    "after BatchNorm re-estimation",
    "after BatchNorm re-estimation, no training; null without BatchNorm",
    "the same after BatchNorm re-estimation",
    (("color", "#d9822b"), ("marker", "s"), ("linestyle", "-.")),
    rank=3,
)
RECONSTRUCTED = Rung(
    "reconstructed",
    "reconstructed",
    "recon.",
    "after layer-wise reconstruction",
    "after layer-wise reconstruction, no training; null where it is left out",
    "the same after layer-wise reconstruction",
    (("color", "#5b2a86"), ("marker", "^"), ("linestyle", (0, (5, 1, 1, 1, 1, 1)))),
    rank=1,
)
RECOVERED = Rung(
    "recovered",
    "recovered",
    "recovered",
    "after distillation",
    "of the student selected on the reference set",
    "the same for the selected student: what trials are ranked by",
    (("color", "#0b5cad"), ("marker", "o"), ("linestyle", "-"), ("linewidth", 2.0)),
)
QUANTISED = Rung(
    "quantised",
    "quantised to int8",
    "int8",
    "as an int8 file",
    "of the int8 file of the student; null without int8",
    "the same for the int8 file",
    (("color", "#0e7c66"), ("marker", "P"), ("linestyle", (0, (1, 1)))),
    rank=1,
)
RUNGS = (TEACHER, PRUNED, BN_REESTIMATED, RECONSTRUCTED, RECOVERED, QUANTISED)
STUDENTS = RUNGS[1:]
BEFORE = (PRUNED, BN_REESTIMATED, RECONSTRUCTED)  # of the student, before it is trained
BESIDE = (*BEFORE, QUANTISED)  # all but the recovered student, which trials are ranked by


def is_enough(kl: float, enough_kl: float) -> bool:
    """Whether a repair ends at a KL divergence. Never with 0: rounding makes that of equal networks negative."""
    return enough_kl > 0 and kl < enough_kl


def ended_early(row: Mapping[str, Any]) -> bool:
    """Whether a row's student was near enough to its teacher (`enough_kl`) before any training."""
    kl, enough, best_step = (row.get(name) for name in ("reference_kl", "enough_kl", "best_step"))
    if is_null(kl) or is_null(enough) or is_null(best_step):
        return False
    schedule = row.get("pruning.schedule")  # null where zeros are removed otherwise: that is done in one shot
    return (is_null(schedule) or schedule == "one_shot") and best_step == 0 and is_enough(kl, enough)  # type: ignore[arg-type]
