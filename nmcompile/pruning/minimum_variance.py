"""The minimum-variance unbiased estimator (MVUE) of a block for any N:M.

The variance of an estimator that keeps element i with probability p_i and emits a_i / p_i is Σ a_i² / p_i - a_i²,
Equation (11) of Chmiel et al. 2023. It depends on the p_i alone and is least for p_i = min(1, c |a_i|) with Σ p_i = N,
Equations (18) and (20) for 2:4. Any way to draw exactly N elements with these p_i is a minimum-variance estimator;
systematic sampling draws them from one uniform number u per block, in two steps:

1. Water-filling finds the saturated elements (p = 1). With R = N, up to N times: S is the sum of |a| over the elements
   that are not saturated; those with |a| > 0 and |a| R >= S become saturated, and R falls by their number.
2. Thresholds t_j = ((u + j) S) / R, j = 0, ..., R - 1, cut the running sums of |a| over the others. Each takes the
   first element whose running sum exceeds it. Where rounding pushes it past the end (position M) or onto a kept
   element, it takes the nearest non-zero element that is not kept, the lower one of two.

Saturated elements are emitted unchanged, the others as sign(a) (S / R). A block with at most N non-zeros is unchanged.
Exactly min(N, non-zeros) elements are kept, whatever the rounding. Kernels copy the operations and their order: sums
run in index order, and products, quotients and sums round to float32 (float64 for float64) one by one.
"""

import torch
from torch import Tensor

from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.selection import Selection, first_above, nearest, running_sums, total


def select_mvue(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep elements with p_i = min(1, c |a_i|); see the module."""
    saturated, sampled, step = sample(blocks.abs(), pattern.n_keep, u[0])
    return Selection(saturated | sampled, torch.where(saturated, blocks, torch.copysign(step, blocks)))


def sample(a: Tensor, n_keep: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the elements that MVUE keeps.

    Args:
        a: magnitudes, `(M, blocks)`.
        n_keep: N.
        u: one uniform number per block, `(blocks,)`, of the dtype of `a`.

    Returns:
        The masks `(M, blocks)` of the saturated and of the sampled elements, and S / R `(blocks,)`.
    """
    nonzero = a > 0
    saturated, remaining, rest = _fill(a, n_keep)
    few = nonzero.sum(0) <= n_keep
    saturated = torch.where(few, nonzero, saturated)
    remaining = torch.where(few, 0, remaining)
    sums = running_sums(torch.where(saturated, 0.0, a))
    sampled = torch.zeros_like(saturated)
    for j in range(n_keep):
        position = first_above(sums, (u + j) * rest / remaining)
        sampled |= nearest(nonzero & ~saturated & ~sampled, position) & (j < remaining)
    return saturated, sampled, rest / remaining


def _fill(a: Tensor, n_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run water-filling; return the saturated elements, R and S. N rounds do; one that saturates nothing is idle."""
    saturated = torch.zeros_like(a, dtype=torch.bool)
    remaining = torch.full_like(a[0], n_keep)
    for _ in range(n_keep):
        rest = total(torch.where(saturated, 0.0, a))
        joining = ~saturated & (a > 0) & (a * remaining >= rest)
        saturated |= joining
        remaining -= joining.sum(0)
    return saturated, remaining, rest


mvue = BlockOperator("mvue", select_mvue, draws=1, unbiased=True)
