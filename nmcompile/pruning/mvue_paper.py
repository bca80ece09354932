"""The paper's own forms of MVUE: Equation (7) for 1:2, Appendix A.2 for 2:4, and the approximation of Equation (25).

`mvue` has the same expectation and variance as the first two for every N:M; they stay as oracles and baselines. A block
with at most N non-zeros is unchanged. As in `mvue`, sums run in index order and every operation rounds by itself.
"""

import torch
from torch import Tensor

from nmcompile.pruning.operator import BlockOperator
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.selection import Selection, first_above, nearest, running_sums, total


def select_one_of_two(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Keep a of [a, b] if u (|a| + |b|) < |a|, else b; emit sign (|a| + |b|), by Equation (7)."""
    a = blocks.abs()
    both = a[0] + a[1]
    first = (u[0] * both < a[0]) | (a[1] == 0)
    return Selection(torch.stack([first, ~first]), torch.copysign(both, blocks))


def select_pairs(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Sort the four magnitudes, draw a pair by Equations (37), (39) or (40), and emit a_i / p_i, as in Appendix A.2.

    a_i / p_i is sign(a_i) (a_1 + a_2 + a_3 + a_4) / 2 in cases 1 and 2. In case 3 the largest is emitted unchanged and
    the other one as sign(a_i) (a_1 + a_2 + a_3), which leaves blocks with at most two non-zeros unchanged.
    """
    a, order = blocks.abs().sort(dim=0, stable=True)
    cumulative = running_sums(_pair_weights(a))
    pair = first_above(cumulative, u[0] * cumulative[-1]).clamp_(max=len(PAIRS) - 1).long()
    drawn = torch.tensor(PAIRS, device=blocks.device)[pair].t()
    chosen = torch.zeros_like(blocks, dtype=torch.bool).scatter_(0, order.gather(0, drawn), True)
    dominant = a[3] >= a[0] + a[1] + a[2]
    step = torch.where(dominant, a[0] + a[1] + a[2], total(a) / 2)
    largest = torch.zeros_like(chosen).scatter_(0, order[3:], True)
    values = torch.where(largest & dominant, blocks, torch.copysign(step, blocks))
    return Selection(chosen, values)


PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Indices into the sorted block of the paper's p12, p13, p14, p23, p24, p34."""


def _pair_weights(a: Tensor) -> Tensor:
    """Return 2 (a1 + a2 + a3 + a4) p_ij of `PAIRS` in cases 1 and 2, a_i of (i, 4) in case 3, `(6, blocks)`."""
    a1, a2, a3, a4 = a
    zero = torch.zeros_like(a1)
    top = 2 * (a3 + a4 - a1 - a2)
    even = torch.stack([zero, 2 * a1 + a3 - a4, 2 * a1 - a3 + a4, 2 * a2 + a3 - a4, 2 * a2 - a3 + a4, top])
    uneven = torch.stack([zero, zero, 4 * a1, 2 * (a1 + a2 + a3 - a4), 2 * (a2 + a4 - a1 - a3), top])
    dominant = torch.stack([zero, zero, a1, zero, a2, a3])
    weights = torch.where(a4 <= 2 * a1 + a3, even, uneven)
    return torch.where(a4 >= a1 + a2 + a3, dominant, weights).clamp_(min=0)


def select_approx(blocks: Tensor, pattern: NMPattern, u: Tensor) -> Selection:
    """Draw twice without replacement with probability ∝ |a|; emit a_i / p_i, p_i by Equation (25) (Section 4.4)."""
    a = blocks.abs()
    nonzero = a > 0
    chosen = _draw(a, nonzero, u[0])
    chosen = chosen | _draw(torch.where(chosen, 0.0, a), nonzero & ~chosen, u[1])
    few = nonzero.sum(0) <= 2
    return Selection(chosen, torch.where(few, blocks, torch.copysign(_inverse_probability(a), blocks)))


def _draw(a: Tensor, allowed: Tensor, u: Tensor) -> Tensor:
    """Return the mask of one element drawn with probability ∝ a; the nearest allowed one if rounding leaves none."""
    sums = running_sums(a)
    return nearest(allowed, first_above(sums, u * sums[-1]))


def _inverse_probability(a: Tensor) -> Tensor:
    """Return a_i / p_i = S / (1 + Σ_{k≠i} a_k / (S - a_k)), `(M, blocks)`, at least a_i; sums omit by index."""
    block = a.shape[0]
    others = [total(torch.cat([a[:k], a[k + 1 :]])) for k in range(block)]
    odds = a / torch.stack(others)
    terms = [1 + total(torch.cat([odds[:i], odds[i + 1 :]])) for i in range(block)]
    return torch.maximum(total(a) / torch.stack(terms), a)


mvue_one_of_two = BlockOperator("mvue_one_of_two", select_one_of_two, draws=1, unbiased=True, patterns="1:2")
mvue_pairs = BlockOperator("mvue_pairs", select_pairs, draws=1, unbiased=True, patterns="2:4")
mvue_approx = BlockOperator("mvue_approx", select_approx, draws=2, unbiased=True, patterns="2:M")
