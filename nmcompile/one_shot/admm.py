"""Masks by ADMM (Boža 2024, arXiv 2401.02938; ALPS, Meng et al. 2024, arXiv 2406.07831).

Minimise ½ tr((W - W⁰) H (W - W⁰)ᵀ) over the weights Z of the pattern, where the dual V enforces W = Z. With ρ the
penalty, ALPS's Equation (4) reads

    W = (W⁰ H - V + ρ Z) (H + ρ I)⁻¹        Z = the pattern's projection of W + V / ρ        V += ρ (W - Z)

Columns are scaled first so that H has the diagonal 1: the projection, the largest squares, then selects by Wanda's
score. One eigendecomposition of H serves every ρ. ρ grows until the support stands; the weights on it are refitted.
"""

import torch
from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.refit import refit
from nmcompile.one_shot.select import Selector

FIRST = 0.1  # ρ, with H of diagonal 1
EVERY = 3  # iterations between two values of ρ
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of ρ, by the share of the support that changed, as published
LONGEST = 300  # iterations


def admm(weights: Tensor, hessian: Hessian, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return the pruned weights and their mask."""
    dense = weights * hessian.used.unsqueeze(1)
    matrix = hessian.damped().to(weights.dtype)
    scale = matrix.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    groups = zip((dense * scale).split(1), (matrix / scale / scale.mT).split(1), strict=True)
    mask = torch.cat([_find_support(*group, choose) for group in groups])
    return refit(dense, mask, matrix, dense), mask


def _find_support(dense: Tensor, hessian: Tensor, choose: Selector) -> Tensor:
    values, vectors = torch.linalg.eigh(hessian)
    values = values.unsqueeze(1)
    pull = dense @ hessian
    mask = checked = choose(dense.square())
    pruned, dual, penalty = dense * mask, torch.zeros_like(dense), FIRST
    for iteration in range(1, LONGEST + 1):
        solution = ((pull - dual + penalty * pruned) @ vectors / (values + penalty)) @ vectors.mT
        shifted = solution + dual / penalty
        mask = choose(shifted.square())
        pruned = shifted * mask
        dual += penalty * (solution - pruned)
        if iteration % EVERY == 0:
            changed = float((mask & ~checked).sum() / mask.sum())
            if changed == 0:
                break
            checked = mask
            penalty *= next(growth for share, growth in GROWTH if changed >= share)
    return mask
