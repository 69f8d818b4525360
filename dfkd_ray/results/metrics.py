"""The numbers of a trial that tables and expectations speak of: columns of `trials`, and points lost.

Points lost are defined here, once: 100 * (teacher's test accuracy - a rung's), in percentage points of test accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dfkd_ray.ladder import RECOVERED, RUNGS, STUDENTS, TEACHER, Rung
from dfkd_ray.results.schemas import METRICS, WRITTEN_AT, close_to


@dataclass(frozen=True)
class Metric:
    """A number of a trial. `rung`: of points lost, the rung whose accuracy is compared with the teacher's.

    `times`: the factor by which tables show it (100: a share in percent); `decimals`: how many they show.
    """

    name: str
    rung: Rung | None = None
    times: float = 1.0
    decimals: int = 2

    @property
    def columns(self) -> list[str]:
        """The columns of `trials` that it is computed from."""
        return [self.name] if self.rung is None else [TEACHER.accuracy, self.rung.accuracy]

    @property
    def is_tested(self) -> bool:
        """Whether it depends on a test set."""
        return all(column in ACCURACIES for column in self.columns)

    def of(self, trials: Any) -> Any:
        """Its values in a frame of trials, as floats; NaN where it was not measured. Shares are in [0, 1]."""
        values = [trials[column].astype(float) for column in self.columns]
        return values[0] if self.rung is None else 100 * (values[0] - values[1])


ACCURACIES = {rung.accuracy for rung in RUNGS}
SHARES = ACCURACIES | {str(rung.agreement) for rung in STUDENTS}  # shown in percent
VERSIONS = ("trial_version", "synthesis_version")
NUMBERS = [name for name, (kind, _, _) in METRICS.items() if kind in (pa.float64(), pa.int64())]


def points_lost(rung: Rung) -> str:
    """The name of a rung's points lost: `points_lost` for the recovered student, else with the rung's name before."""
    return "points_lost" if rung is RECOVERED else f"{rung.name}_points_lost"


KNOWN = {points_lost(rung): Metric(points_lost(rung), rung) for rung in STUDENTS}
KNOWN |= {
    name: Metric(name, times=100.0 if name in SHARES else 1.0)
    for name in NUMBERS
    if name not in (WRITTEN_AT, *VERSIONS)
}


def metric(name: str) -> Metric:
    """The metric of a trial of this name. `ValueError`, with a suggestion, if there is none."""
    return known(name, KNOWN, "a trial")


def known(name: str, metrics: Mapping[str, Metric], what: str) -> Metric:
    """One of some metrics. `ValueError`, with a suggestion, if it is none of them."""
    if name not in metrics:
        raise ValueError(f"{name!r}: no metric of {what}{close_to(name, metrics)}")
    return metrics[name]
