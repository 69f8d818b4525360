"""A recovered student and the columns of its trial's row that are about it."""

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from dfkd_ray import ladder
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import pruning
from dfkd_ray.config import TrialConfig
from dfkd_ray.distillation import Pool, State
from dfkd_ray.ladder import Rung
from dfkd_ray.trial import starting
from dfkd_ray.trial.images import Rounds
from dfkd_ray.trial.row import cost_columns, pass_columns, size_columns
from dfkd_ray.trial.rungs import Rungs, Start
from dfkd_ray.trial.warnings import warnings_of


@dataclass(frozen=True)
class Recovered:
    """The student of the selected rung, on the CPU, what it began as, and the images and state of its distillation.

    `num_before`: parameters before channels were removed.
    """

    student: nn.Module
    num_before: int
    start: Start
    selected: Rung
    state: State
    rounds: Rounds
    pool: Pool

    def pruned(self, config: TrialConfig) -> tuple[str, ...]:
        """The names of the weights that have a mask."""
        masked = config.pruning.sparsity > 0 or self.start.masks
        return tuple(pruning.prunable(self.student)) if masked and self.start.choice is None else ()


def columns(config: TrialConfig, teacher: Teacher, own: Recovered, rungs: Rungs) -> dict[str, Any]:
    """The columns of a recovered student: which rung it is, how near to its teacher, its size and its warnings."""
    state, start, is_last = own.state, own.start, own.selected is ladder.RECOVERED
    kl, agreement = rungs.measured[own.selected]
    row = rungs.row | {
        "agreement": agreement,
        "reference_kl": kl,
        "best_step": state.best_step if is_last else 0,
        # Distillation may have kept what it began with.
        "selected": (start.rung if is_last and state.best_step == 0 else own.selected).name,
        "status": "finished",
    }
    row |= pass_columns(own.rounds.rows, state.step * config.distillation.batch_size)
    row |= size_columns(own.student, own.pruned(config)) | cost_columns(own.student, teacher)
    if config.pruning.structure == "channels":  # its sparsity is no number of zeros, even where nothing was removed
        row["achieved_sparsity"] = 1 - row["num_parameters"] / own.num_before
    if start.choice is not None:
        row["channels"] = json.dumps(start.choice.widths)
    warned = [*start.warnings, *starting.warnings_of(config, teacher)]
    warned += warnings_of(config, teacher, row, own.rounds.rows, own.pool)
    return row | {"warnings": "; ".join(warned) or None}
