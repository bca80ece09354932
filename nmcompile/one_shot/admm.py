"""ADMM (Boža 2024, arXiv 2401.02938; ALPS, Meng et al. 2024, arXiv 2406.07831): the mask and the weights together.

Minimise tr((W - W⁰) H (W - W⁰)ᵀ) / 2 subject to W = Z, where Z has the pattern. With the dual V and the penalty ρ:

    W = (W⁰ H - V + ρ Z) (H + ρ I)⁻¹    (1)
    Z = the pattern's projection of W + V / ρ, its largest squares    (2)
    V = V + ρ (W - Z)    (3)

Columns are scaled first so that the diagonal of H is 1; the projection then selects by Wanda's score, as in Boža. One
eigendecomposition H = Q Λ Qᵀ serves every ρ. As in ALPS, ρ grows until the support stands, and the weights on the
support are then set to their least-squares values.
"""

import torch
from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.refit import refit
from nmcompile.one_shot.select import Selector

FIRST = 0.1  # ρ
EVERY = 3  # iterations with one ρ
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of ρ, where more than this share of the support has changed
LONGEST = 300  # iterations; about 45 are usual


def admm(weights: Tensor, hessian: Hessian, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return the pruned weights and their mask."""
    dense = weights * hessian.used.unsqueeze(1)
    matrix = hessian.damped().to(weights.dtype)
    scale = matrix.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    groups = zip((dense * scale).split(1), (matrix / scale / scale.mT).split(1), strict=True)
    pruned, mask = map(torch.cat, zip(*(_iterate(*group, choose) for group in groups), strict=True))
    return refit(dense, mask, matrix, pruned / scale), mask


def _iterate(dense: Tensor, hessian: Tensor, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return Z of one group and its mask, when that has not changed for `EVERY` iterations."""
    values, vectors = torch.linalg.eigh(hessian)
    pull = dense @ hessian
    mask = before = choose(dense.square())
    pruned, dual, penalty = dense * mask, torch.zeros_like(dense), FIRST
    for iteration in range(1, LONGEST + 1):
        solution = (pull - dual + penalty * pruned) @ (vectors / (values.unsqueeze(1) + penalty)) @ vectors.mT  # (1)
        shifted = solution + dual / penalty
        mask = choose(shifted.square())
        pruned = shifted * mask  # (2)
        dual += penalty * (solution - pruned)  # (3)
        if iteration % EVERY == 0:
            changed = (mask & ~before).sum() / mask.sum()
            if not changed:
                break
            penalty *= next(growth for share, growth in GROWTH if changed > share)
            before = mask
    return pruned, mask
