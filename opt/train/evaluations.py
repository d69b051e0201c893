"""What a run's held-out losses come to: which is the best, and whether more are of use."""

import math
from dataclasses import asdict, dataclass


@dataclass
class Evaluations:
    """The losses so far, the same on every process; a checkpoint keeps it as it is."""

    first_loss: float | None = None  # before any step, where that was asked for
    best_loss: float | None = None  # of those after a step; None if none was finite
    best_step: int | None = None
    without_better: int = 0  # evaluations since then

    def add(self, step: int, loss: float) -> None:
        """An evaluation after `step` optimizer steps. That of the given model, after none, is not
        one to be kept: it is there already."""
        if step == 0:
            self.first_loss = loss
        elif math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.without_better = loss, step, 0
        else:
            self.without_better += 1

    def are_enough(self, patience: int | None) -> bool:
        """Whether training is to end early, see --early_stopping_patience."""
        return patience is not None and self.without_better >= patience

    def state(self) -> dict:
        """For a checkpoint: Evaluations(**state) goes on from it."""
        return asdict(self)

    def describe(self) -> str:
        """The best one in words."""
        if self.best_step is None:
            return "no held-out loss was finite"
        text = f"the best held-out loss is {self.best_loss:.4f}, after step {self.best_step}"
        if self.first_loss is not None and self.first_loss <= self.best_loss:
            text += f"; the model that was given has {self.first_loss:.4f}, which is no worse"
        return text
