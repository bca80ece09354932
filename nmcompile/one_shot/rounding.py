"""Rounding of kept weights to a grid, and the step of that grid."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.quantization import Grid, integers

Round = Callable[[Tensor], Tensor]
"""(weights `(groups, rows, columns)`) -> the nearest values that may be stored."""

SHARES = torch.linspace(0.25, 1.0, 31).tolist()  # of the largest weight, the clips that are tried


@dataclass(frozen=True)
class Rounding:
    """A grid of weights.

    Args:
        grid: signed.
        step: positive, 0-d or one for each out-channel: of the rank of the weight, of size 1 in every other dim.
    """

    grid: Grid
    step: Tensor

    def of(self, layer: Layer) -> Round:
        """Return the rounding of the matrices of a layer."""
        step = self.step if self.step.dim() == 0 else self.step.reshape(layer.groups, -1, 1)
        return lambda weights: integers(weights, step, self.grid) * step

    def fitted(self, weights: Tensor, importance: Tensor) -> "Rounding":
        """Return the grid with the step, or steps, of the least weighted squared error of rounding.

        SAWB's step is made for the bell shape of dense weights, and pruning leaves the large ones: it would clip them.

        Args:
            weights: pruned but not rounded yet, `(groups, rows, columns)`.
            importance: weights of the squared errors, `(groups, columns)`.
        """
        dims = (0, 1, 2) if self.step.dim() == 0 else (2,)
        largest = weights.abs().amax(dims, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        least, best = torch.full_like(largest, torch.inf), largest
        for share in SHARES:
            step = share * largest / self.grid.high
            change = integers(weights, step, self.grid) * step - weights
            error = (change.square() * importance.unsqueeze(1)).sum(dims, keepdim=True)
            best = torch.where(error <= least, step, best)
            least = torch.minimum(error, least)
        return replace(self, step=best.reshape(self.step.shape))


def exactly(weights: Tensor) -> Tensor:
    """Return weights that are not rounded."""
    return weights
