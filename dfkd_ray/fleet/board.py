"""The progress board of a sweep, an actor. This module does not import torch: the process starts fast and is small."""


class Board:
    """Progress of the running trials: an actor that trials write to and the driver reads."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[str, int, int]] = {}

    def tell(self, trial_id: str, stage: str, done: int, total: int) -> None:
        """Set a trial's progress."""
        self.stages[trial_id] = (stage, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        """The progress of all trials, including ended ones."""
        return self.stages
