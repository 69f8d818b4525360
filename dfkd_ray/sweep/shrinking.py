"""The sweep of the command `shrink` (channels, int8) as plain data, and the choice of a student from its rows. Pure.

`sweep_of` is the sweep: channels in several shares and by two kinds of importance, each also in int8. `candidates`
turns its rows into students and int8 files with their speed and loss; `choose` picks one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfkd_ray.config import with_overrides
from dfkd_ray.ladder import QUANTISED, RECOVERED, TEACHER, Rung
from dfkd_ray.text import is_null, number_in

# Exponents of the shares of multiplications that are kept, 1 / faster ** t: a student is slower than its share says
# (narrow layers use a core less well), and int8 is faster.
EXPONENTS = (0.5, 1.0, 1.5)
LEAST_KEPT = 0.05  # of the multiplications
# Which is better depends on the network: with a quarter of the multiplications the bundled ResNet-20 loses 5.5 points
# by activations and 6.4 by magnitude, a VGG-19-BN of Fashion-MNIST 6.2 and 2.8 (5,000 validation images, one seed).
IMPORTANCES = ("magnitude", "activations")
ROUND_TO = 8  # channels: kernels for CPUs work on blocks of as many
FASTEST = 20.0  # what may be asked for
# Points of accuracy lost for each nat of KL divergence on the reference set, without test data. Measured: 25 to 61 over
# eight students with fewer channels of the bundled ResNet-8 and ResNet-20 (5,000 validation images, one seed). So an
# estimate is right within a factor of about two, not more.
POINTS_PER_NAT = 40.0
SPEEDS = {False: "latency_ratio", True: "int8_latency_ratio"}  # the columns, by whether it is int8


@dataclass(frozen=True)
class Candidate:
    """A student of a trial, or its int8 file. `lost`: points, measured on test data or estimated (see `lost`).

    `is_doubtful`: its speed was measured on a busy machine.
    """

    trial_id: str
    is_int8: bool
    removed_macs: float
    importance: str | None
    speed: float
    lost: float
    num_bytes: float | None
    is_doubtful: bool = False

    @property
    def name(self) -> str:
        """For a table."""
        kept = "all channels"
        if self.importance is not None:
            kept = f"-{100 * self.removed_macs:.0f} % MACs by {self.importance}"
        return f"{kept}, int8" if self.is_int8 else kept


def check(faster: float, lose_at_most: float) -> None:
    """`ValueError` if `faster` is not above 1 and at most `FASTEST`, or `lose_at_most` is no number from 0 on."""
    if not 1 < faster <= FASTEST:
        raise ValueError(f"faster={faster:g}: expected more than 1 and at most {FASTEST:g} times")
    if not 0 <= lose_at_most < math.inf:
        raise ValueError(f"lose_at_most={lose_at_most:g}: expected a number of percentage points, 0 or more")


def sweep_of(teacher: str, faster: float, *, int8: bool = True, fields: Mapping[str, Any] | None = None) -> dict:
    """The plain data of a sweep file.

    `fields`: dotted fields over these; a share or importance is then the only one.
    """
    base = {
        "teacher": teacher,
        "pruning.structure": "channels",
        "pruning.target": "macs",
        "pruning.round_to": ROUND_TO,
        "quantisation.int8": int8,
        "latency.runtime": "onnxruntime",
        **(fields or {}),
    }
    kept = [max(LEAST_KEPT, faster**-exponent) for exponent in EXPONENTS]
    axes = {"pruning.sparsity": list(dict.fromkeys(round(1 - k, 3) for k in kept)), "pruning.importance": IMPORTANCES}
    grids = [{name: [base.pop(name)] if name in base else list(values) for name, values in axes.items()}]
    if int8:  # the teacher itself: nothing is there to recover
        grids.insert(0, {"pruning.sparsity": [0.0], "distillation.num_steps": [0]})
    return {"base": with_overrides({}, base), "grid": grids}


def candidates(rows: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    """The finished students with a measured speed, fastest first; the teacher's own copy only in int8."""
    found = []
    for row in rows:
        if row["status"] != "finished":
            continue
        removed = 1 - row["num_macs"] / row["teacher_num_macs"]
        importance = None if removed == 0 or is_null(row.get("pruning.importance")) else row["pruning.importance"]
        for rung, is_int8, size in ((RECOVERED, False, "float_file_bytes"), (QUANTISED, True, "int8_file_bytes")):
            speed, points, num_bytes = number_in(row, SPEEDS[is_int8]), lost(row, rung), number_in(row, size)
            if speed is None or points is None:
                continue
            texts = str(row.get("latency_warning")).split("; ")
            doubtful = any(text.startswith(f"{SPEEDS[is_int8]} is doubtful") for text in texts)
            own = Candidate(row["trial_id"], is_int8, removed, importance, speed, points, num_bytes, doubtful)
            found.append(own)
    return sorted(found, key=lambda each: -each.speed)


def is_measured(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether losses are measured on test data; else they are estimated."""
    return bool(rows) and not any(is_null(row.get(TEACHER.accuracy)) for row in rows)


def lost(row: Mapping[str, Any], rung: Rung) -> float | None:
    """Percentage points that a rung's network loses; None where nothing says it."""
    before, own = number_in(row, TEACHER.accuracy), number_in(row, rung.accuracy)
    if before is not None:
        return None if own is None else 100 * (before - own)
    kl = number_in(row, "quantised_kl" if rung is QUANTISED else "reference_kl")
    return None if kl is None else POINTS_PER_NAT * kl


def choose(found: Sequence[Candidate], faster: float, lose_at_most: float) -> Candidate | None:
    """The candidate that loses least of those that are fast enough, if it loses little enough; the faster of equals."""
    enough = [each for each in found if each.speed >= faster and each.lost <= lose_at_most]
    return min(enough, key=lambda each: (each.lost, -each.speed), default=None)


def nearest(found: Sequence[Candidate], faster: float, lose_at_most: float) -> list[Candidate]:
    """Where nothing fits: the fastest that loses little enough, and the one that loses least and is fast enough."""
    near = max((each for each in found if each.lost <= lose_at_most), key=lambda each: each.speed, default=None)
    fast = min((each for each in found if each.speed >= faster), key=lambda each: each.lost, default=None)
    return [each for each in (near, fast) if each is not None]
