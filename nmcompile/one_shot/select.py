"""The mask of the largest scores that satisfies a pattern."""

from dataclasses import dataclass

from torch import Tensor

from nmcompile.pruning.magnitude import mask
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.transposable import transposable_mask


@dataclass(frozen=True)
class Selector:
    """A rule that masks of weight matrices follow.

    Args:
        pattern: N kept of every M.
        is_transposable: N of M along rows and columns of every M x M tile, and not only along the columns of a row.
    """

    pattern: NMPattern
    is_transposable: bool

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the mask with the largest sum of scores, bool `(groups, rows, columns)`; scores are not negative."""
        return transposable_mask(scores, self.pattern) if self.is_transposable else mask(scores, self.pattern)
