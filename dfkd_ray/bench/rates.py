"""How well scores tell members from non-members: true positive rates at low false positive rates, and the AUC. Pure.

The intervals take all scores as independent.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dfkd_ray.results.measurements import Interval

LEVEL = 0.95  # of all intervals
FEWEST_FALSE = 3  # false positives that a rate must allow: fewer do not fix a threshold
ScoresOf = Float[np.ndarray, "_"]


@dataclass(frozen=True)
class Rate(Interval):
    """A number in [0, 1] with its 95 % interval."""


def clopper_pearson(hits: int, total: int, level: float = LEVEL) -> Rate:
    """A share with its exact binomial interval. Source: Clopper and Pearson 1934, by quantiles of the beta function."""
    from scipy.special import betaincinv

    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total}: expected a number of hits in at least one trial")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, total - hits + 1, tail))
    high = 1.0 if hits == total else float(betaincinv(hits + 1, total - hits, 1 - tail))
    return Rate(hits / total, low, high)


def fewest_non_members(fpr: float) -> int:
    """Non-members that a false positive rate needs, so that it allows `FEWEST_FALSE` of them."""
    return int(np.ceil(FEWEST_FALSE / fpr - 1e-9))


def check(members: ScoresOf, non_members: ScoresOf) -> None:
    """`ValueError` unless both have scores and no score is NaN."""
    if not len(members) or not len(non_members):
        raise ValueError(f"{len(members)} members and {len(non_members)} non-members: expected some of both")
    if np.isnan(members).any() or np.isnan(non_members).any():
        raise ValueError("a score is not a number")


def tpr_at(members: ScoresOf, non_members: ScoresOf, fpr: float) -> Rate:
    """The share of members above the lowest threshold that at most a share `fpr` of the non-members exceeds.

    The interval is of that share at this threshold. `ValueError` if so many non-members cannot resolve the rate.
    """
    check(members, non_members)
    needed = fewest_non_members(fpr)
    if len(non_members) < needed:
        raise ValueError(
            f"a false positive rate of {100 * fpr:g} % needs {needed:,} non-members, and there are {len(non_members):,}"
        )
    allowed = int(fpr * len(non_members) + 1e-9)
    limit = np.sort(non_members)[::-1][allowed] if allowed < len(non_members) else -np.inf
    return clopper_pearson(int((members > limit).sum()), len(members))


def auc(members: ScoresOf, non_members: ScoresOf) -> Rate:
    """The area under the ROC curve (ties count half) with a normal interval from DeLong's variance.

    Source: DeLong et al. 1988. Without any overlap of the scores the variance is 0, and so is the interval's width.
    """
    from scipy.special import ndtri

    check(members, non_members)
    below = placements(members, non_members)
    above = 1 - placements(non_members, members)
    value = float(below.mean())
    variance = sum(part.var(ddof=1) / len(part) if len(part) > 1 else 0.0 for part in (below, above))
    half = float(ndtri((1 + LEVEL) / 2) * np.sqrt(variance))
    return Rate(value, max(0.0, value - half), min(1.0, value + half))


def placements(values: ScoresOf, others: ScoresOf) -> ScoresOf:
    """For each value the share of the others below it; equal ones count half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(ordered))


def roc(members: ScoresOf, non_members: ScoresOf) -> tuple[ScoresOf, ScoresOf]:
    """The ROC curve: false and true positive rates, a point for each threshold at a non-member's score, rising.

    It begins where one false positive is allowed.
    """
    check(members, non_members)
    limits, counts = np.unique(non_members, return_counts=True)
    false = np.cumsum(counts[::-1]) / len(non_members)
    ordered = np.sort(members)
    true = 1 - np.searchsorted(ordered, limits[::-1], "left") / len(members)
    return false, true
