"""The record of a finalization: which masks the weights obey, and on which grids they are."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nmcompile.quantization import Grid, integers
from nmcompile.three_gemm.stored_weights import Place
from nmcompile.training.masks import WeightMask

FINALIZED = "_nmcompile_finalized"
"""Attribute of a finalized model, with the record."""
CLOSE = 0.01  # of a step: more than the rounding of bfloat16 to a grid of 4 bits


@dataclass(frozen=True)
class OnGrid:
    """A weight that was written on a grid.

    Args:
        weight: its full name.
        grid: the grid.
        step: its step, one or one for each out-channel.
    """

    weight: str
    grid: Grid
    step: Tensor

    def holds(self, weight: Tensor) -> bool:
        """Return whether values are on the grid, within the rounding of their dtype."""
        step = self.step.to(weight.device).double()
        off = integers(weight.double(), step, self.grid) * step - weight
        return bool((off.abs() <= CLOSE * self.grid.high * step).all())


@dataclass(frozen=True)
class Finalized:
    """Record of a finalization, stored on the root of the finalized model.

    Args:
        masks: by the full name of the weight, its mask, and its place if it is a slice of a parameter.
        grids: by the name of the layer, its weight on its grid.
    """

    masks: Mapping[str, tuple[WeightMask, Place | None]]
    grids: Mapping[str, OnGrid]
