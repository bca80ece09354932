"""Count of a weight's optimizer steps, without waiting for the device that knows whether they were made."""

import torch
from torch import Tensor

PENDING = 100  # unread results of fused optimizers


class StepCount:
    """A count of optimizer steps, some of which a GradScaler may have made a fused optimizer skip.

    Args:
        made: steps so far.
    """

    def __init__(self, made: int = 0) -> None:
        self.made = made
        self.pending: list[Tensor] = []

    def read(self) -> int:
        """Return the number of steps that were made, waiting for the GPU if necessary."""
        if self.pending:
            made = torch.stack([found_inf.reshape(()) for found_inf in self.pending]) == 0
            self.pending.clear()
            self.made += int(made.sum())
        return self.made

    def add(self, found_inf: Tensor | None, period: int | None) -> bool:
        """Count one step, unless `found_inf` is not zero; return whether it may complete a period.

        `found_inf` is read only if it decides that.
        """
        before = self.made
        if found_inf is None:
            self.made += 1
        else:
            self.pending.append(found_inf)
        if len(self.pending) == PENDING:
            self.read()
        most = self.made + len(self.pending)
        if period is None or most // period == before // period:
            return False
        # If every step counts, recomputing the same mask is cheaper than waiting for a GPU.
        return period == 1 or self.read() // period > before // period
