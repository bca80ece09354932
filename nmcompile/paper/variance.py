"""Probabilities and variances of the paper's estimators, in closed form and float64."""

import torch
from torch import Tensor


def optimal_variance(a: Tensor, n_keep: int) -> Tensor:
    """Return the variance of MVUE, Equation (11) at p_i = min(1, c |a_i|) with Σ p_i = N, Equations (18) and (20).

    Args:
        a: magnitudes, `(blocks, M)` float64.
        n_keep: N.

    Returns:
        `(blocks,)` float64; 0 for a block with at most N non-zeros.
    """
    saturated = torch.zeros_like(a, dtype=torch.bool)
    for _ in range(n_keep):
        remaining = n_keep - saturated.sum(1, keepdim=True)
        rest = torch.where(saturated, 0.0, a).sum(1, keepdim=True)
        saturated |= (a > 0) & (a * remaining >= rest)
    remaining = n_keep - saturated.sum(1, keepdim=True)
    rest = torch.where(saturated, 0.0, a)
    # a² / p - a² = a (S / R - a) with p = a R / S; where nothing remains to be drawn, S is 0 too.
    step = rest.sum(1, keepdim=True) / remaining.clamp(min=1)
    return torch.where(saturated, 0.0, a * (step - a)).sum(1)


def approximate_variance(a: Tensor) -> Tensor:
    """Return the variance of approx-MVUE 2:M, Equation (11) at the p_i of Equation (25).

    It sums a_i² (1 - p_i) / p_i, where 1 - p_i is the probability of the pairs without i: near the edge, where one
    element is far above the others, 1 - p_i computed as a difference would be rounding alone.
    """
    total = a.sum(1, keepdim=True)
    # pairs[:, i, j]: the probability of drawing i first and j second.
    pairs = (a / total).unsqueeze(2) * a.unsqueeze(1) / (total - a).unsqueeze(2)
    pairs = pairs * (1 - torch.eye(a.shape[1], dtype=a.dtype))
    kept = pairs.sum(1) + pairs.sum(2)
    missed = torch.stack([_without(pairs, i).sum((1, 2)) for i in range(a.shape[1])], dim=1)
    return torch.where(a > 0, a * a * missed / kept, 0.0).sum(1)


def _without(pairs: Tensor, i: int) -> Tensor:
    others = [k for k in range(pairs.shape[1]) if k != i]
    return pairs[:, others][:, :, others]
