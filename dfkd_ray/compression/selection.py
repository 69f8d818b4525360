"""Which weights of a layer stay, chosen by the layer's least squares: as many of each row as its mask keeps.

A criterion scores weights one by one. But the inputs of a layer depend on each other: what one weight gives, others can
give in its place. This solves the problem of `least_squares` with the number of weights in place of their positions.
For a row of the teacher, with the second moments H, c of `layerwise` and the ridge r in them,

    minimise wᵀ H w − 2 cᵀ w   over w with k non-zero weights

by the alternating direction method of multipliers (ADMM), in inputs scaled to a variance of 1. Its result is a set of
positions; the weights there are then solved for. A row whose error would be larger than with its mask keeps the mask.

Source: Meng et al. 2024 (ALPS), arXiv 2406.07831, section 3, with the schedule of its penalty. Different here: each row
keeps its own number of weights (or N of M neighbours), not the layer one; a criterion gives these numbers.

What did not work better, on the bundled ResNet-20 at 0.95, in points lost after reconstruction and after distillation
(validation images, three seeds, by a first form of this code; this: 4.6 and 2.8, the criterion's mask: 14 and 5.6).
Exchanging pairs of weights, from the criterion's mask until no exchange lowers the error: 5.5 and 3.3, although the
layers' errors were 4 % smaller. The same exchanges after ADMM: 4.8 and 3.0. One number for the whole layer, one seed:
5.6 and 3.4, against 4.8 and 2.9. The rows' numbers by ERK, Wanda or global magnitude: 6.3, 5.8, 5.7 against 4.8 before
distillation, by OBS 4.8.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dfkd_ray.compression.least_squares import ridged, solve
from dfkd_ray.compression.moments import Moments

MOST_ITERATIONS = 300  # it ends where three of them change no position: after 20 to 60
PENALTY = 0.1  # at the start
CHECKED_EVERY = 3  # iterations between two rises of the penalty
RISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of positions changed since the last rise, at least → factor
START_RIDGE = 1e-6  # of the largest eigenvalue: with it the dense problem can be solved in float32
MOST_OPERATIONS = 5e12  # of a layer: a minute or two of a core; else its positions stay


@dataclass(frozen=True)
class Selection:
    """How many weights stay: of each row as many as before, or (`neighbours`) of each M neighbours along the inputs."""

    neighbours: int | None = None

    def choose(
        self, moments: Moments, dense: Tensor, kept: Tensor, ridge: float, num_positions: int
    ) -> tuple[Tensor, Tensor] | None:
        """The positions that stay, and the fitted rows there, both (groups, outputs, inputs).

        `kept`: the positions of a criterion; `dense`: the teacher's rows; `num_positions`: kernel positions of an input
        channel. None for a layer that is too large, or whose moments cannot be decomposed.
        """
        if bool(kept.all()) or not bool(kept.any()):
            return kept, solve(moments, dense, kept, ridge)
        if num_operations(kept) > MOST_OPERATIONS:
            return None
        damping, wanted = ridged(moments, dense, ridge)
        alive = damping > 0
        diagonal = moments.gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(alive[:, None], diagonal + damping[:, None], 1.0).sqrt()
        matrix = moments.gram + torch.diag_embed(damping[:, None].expand_as(scale))
        matrix = (matrix / scale[:, :, None] / scale[:, None]).float()
        scaled = (wanted / scale[:, None]).float()
        try:
            values, vectors = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return None
        found = torch.where(alive[:, None, None], self.admm(values, vectors, scaled, kept, num_positions), kept)
        # The error of a fitted row is that of a row of zeros less `rows · wanted`.
        rows, before = (solve(moments, dense, positions, ridge) for positions in (found, kept))
        better = ((rows * wanted).sum(2) > (before * wanted).sum(2))[:, :, None]
        return torch.where(better, found, kept), torch.where(better, rows, before)

    def admm(self, values: Tensor, vectors: Tensor, wanted: Tensor, kept: Tensor, num_positions: int) -> Tensor:
        """The positions, from the eigenvalues and eigenvectors of the scaled H, and the scaled c."""
        values = values.clamp_min(0)

        def solved(right: Tensor, penalty: float | Tensor) -> Tensor:
            return ((right @ vectors) / (values + penalty)[:, None]) @ vectors.mT

        smallest = (START_RIDGE * values[:, -1:]).clamp_min(torch.finfo(values.dtype).tiny)
        sparse, dual, penalty = solved(wanted, smallest), torch.zeros_like(wanted), PENALTY
        positions, before, num_kept = kept, None, int(kept.sum())
        for iteration in range(1, MOST_ITERATIONS + 1):
            free = solved(wanted - dual + penalty * sparse, penalty)
            shifted = free + dual / penalty
            positions = self.largest(shifted, kept, num_positions)
            sparse = shifted * positions
            dual = dual + penalty * (free - sparse)
            if iteration % CHECKED_EVERY == 0:
                changed = num_kept if before is None else int((positions != before).sum())
                if changed == 0:
                    break
                if before is not None:
                    penalty *= next(factor for share, factor in RISES if changed >= share * num_kept)
                before = positions
        return positions

    def largest(self, values: Tensor, kept: Tensor, num_positions: int) -> Tensor:
        """The positions of the largest magnitudes, in each block as many as `kept` has there; ties by position."""
        blocks, counts = (
            self.blocks(values.abs(), num_positions),
            self.blocks(kept, num_positions).sum(-1, keepdim=True),
        )
        # NumPy sorts numbers 30 times faster than PyTorch does on CPUs: all but ties are decided by the smallest kept.
        ranked = torch.from_numpy(np.sort(blocks.cpu().numpy(), axis=-1)).to(blocks.device)
        smallest = ranked.gather(-1, (blocks.shape[-1] - counts).clamp_max(blocks.shape[-1] - 1))
        first = (blocks >= smallest) & (counts > 0)
        tied = first.sum(-1) != counts[..., 0]
        if bool(tied.any()):
            order = torch.argsort(blocks[tied], dim=-1, descending=True, stable=True)
            wanted = torch.arange(blocks.shape[-1], device=values.device) < counts[tied]
            first[tied] = torch.zeros_like(wanted).scatter_(-1, order, wanted)
        result = torch.empty_like(kept)
        self.blocks(result, num_positions).copy_(first)
        return result

    def blocks(self, rows: Tensor, num_positions: int) -> Tensor:
        """A view of rows (groups, outputs, inputs) whose last dimension is a block: a row, or M neighbours of it."""
        if self.neighbours is None:
            return rows
        return rows.unflatten(-1, (-1, self.neighbours, num_positions)).movedim(-2, -1)


def num_operations(kept: Tensor) -> float:
    """Floating-point operations: a decomposition, and some 40 iterations of two products."""
    groups, outputs, inputs = kept.shape
    return groups * (10.0 * inputs**3 + 160.0 * outputs * inputs**2)
