"""The times of a whole step of a model, pruned and dense."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step of the whole model with example inputs, without pruning and as it was compiled."""

    dense: float
    compiled: float

    @property
    def gain(self) -> float:
        """Return dense time / compiled time."""
        return self.dense / self.compiled

    def __str__(self) -> str:
        return f"a whole step took {self.compiled * 1e3:.4g} ms, {self.dense * 1e3:.4g} ms dense: {self.gain:.2f} ×"
