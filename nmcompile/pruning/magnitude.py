"""Deterministic operators: the N largest of every M elements."""

import torch
from torch import Tensor

from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.selection import Selection, largest, magnitudes


def select_by_magnitude(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep the N elements of the largest |a|, unchanged."""
    return Selection(largest(magnitudes(blocks), pattern.n_keep))


def select_by_value(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep the N largest elements with their sign, unchanged: for activations after a ReLU, where |a| is a itself.

    The zeros that pad a partial block outrank its negative elements.
    """
    return Selection(largest(torch.where(torch.isfinite(blocks), blocks, torch.inf), pattern.n_keep))


greedy = BlockOperator("greedy", select_by_magnitude)
greedy_by_value = BlockOperator("greedy_by_value", select_by_value)


def mask(x: Tensor, pattern: NMPattern | str, dim: int = -1) -> Tensor:
    """Return the mask of `greedy`, bool of the shape of `x`: N of every M, also where the block is zero.

    Args:
        x: float64, float32, bfloat16 or float16 of any shape but 0-d.
        pattern: an `NMPattern` or text, `"2:4"`.
        dim: the dim along which blocks run.

    Raises:
        OperandError: `x` is not a tensor that the operator takes.
    """
    return greedy.mask(x, pattern, dim)
