"""Rounding of kept weights to a grid whose step is given."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.quantization import Grid, integers

Round = Callable[[Tensor], Tensor]
"""(weights `(groups, rows, columns)`) -> the nearest values that may be stored."""


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


def exactly(weights: Tensor) -> Tensor:
    """Return weights that are not rounded."""
    return weights
