"""The kept weights of a layer's rows by least squares, from the moments of its inputs and targets: see `layerwise`."""

import torch
from torch import Tensor

from dfkd_ray.compression.moments import Moments

# Entries of the matrices of one batch of rows. With those that fit into a cache it is three times as fast as with 2^25.
SOLVED_AT_ONCE = 1 << 20


def ridged(moments: Moments, dense: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The ridge r of each group, zero where its inputs are, and the right-hand sides (groups, outputs, inputs)."""
    damping = ridge * moments.gram.diagonal(dim1=1, dim2=2).mean(1)
    return damping, moments.cross + damping[:, None, None] * dense


def solve(moments: Moments, dense: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The fitted rows (groups, outputs, inputs), zero where not kept. `dense`: the teacher's rows; both float64.

    Rows with similar numbers of kept weights are solved together, padded with the identity. A row that cannot be solved
    keeps the teacher's weights.
    """
    result = dense * kept
    damping, wanted = ridged(moments, dense, ridge)
    counts = (kept.sum(2) * (damping > 0)[:, None]).flatten()
    todo = torch.argsort(counts, descending=True, stable=True)[: int((counts > 0).sum())]
    while len(todo):
        size = int(counts[todo[0]])
        part, todo = todo[: max(1, SOLVED_AT_ONCE // size**2)], todo[max(1, SOLVED_AT_ONCE // size**2) :]
        group, row = part // kept.shape[1], part % kept.shape[1]
        mask = kept[group, row]
        order = torch.argsort(mask.to(torch.int8), dim=1, descending=True, stable=True)[:, :size]
        real = mask.gather(1, order)
        matrix = moments.gram[group[:, None, None], order[:, :, None], order[:, None, :]]
        matrix = matrix * (real[:, :, None] & real[:, None])
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(real, damping[group][:, None], 1.0))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        right = wanted[group, row].gather(1, order) * real
        solution = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        good = (failed == 0) & solution.isfinite().all(1)
        solution = torch.where(good[:, None], solution, dense[group, row].gather(1, order)) * real
        result[group, row] = torch.zeros_like(result[group, row]).scatter_(1, order, solution)
    return result


def of_channels(mask: Tensor) -> bool:
    """Whether a mask (rows, …) keeps or drops whole rows, and of the others the same weights in each."""
    rows = mask.flatten(1)
    some = rows[rows.any(1)]
    return bool((some == some[:1]).all())


def solve_together(moments: Moments, dense: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """As `solve` where the rows of a group keep the same inputs, or none: one factor serves all rows of the group.

    A group that cannot be solved keeps the teacher's weights.
    """
    damping, wanted = ridged(moments, dense, ridge)
    inputs = kept.any(1)  # (groups, inputs)
    real = inputs & (damping > 0)[:, None]
    matrix = moments.gram * (real[:, :, None] & real[:, None])
    matrix.diagonal(dim1=1, dim2=2).add_(torch.where(real, damping[:, None], 1.0))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    right = wanted * real[:, None]
    solution = torch.cholesky_solve(right.mT, factor).mT
    good = real.any(1) & (failed == 0) & solution.isfinite().all(2).all(1)
    return torch.where(good[:, None, None], solution, dense) * kept
