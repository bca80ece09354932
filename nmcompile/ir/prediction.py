"""A predicted gain: of all GEMMs of a step with their pruning, on one machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Seconds of all GEMMs of a step by a cost model, without pruning, and pruned with the pruning itself.

    Args:
        machine: its name.
        dense, pruned: seconds. Other operators and Python are in neither, so a step gains less.
        basis: where the costs come from, and how far their predictions were off.
    """

    machine: str
    dense: float
    pruned: float
    basis: str

    @property
    def gain(self) -> float:
        """Return dense time / pruned time."""
        return self.dense / self.pruned
