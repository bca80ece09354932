"""The best values of the weights that a mask keeps.

Row by row, min over w on the support of (w - w⁰) H (w - w⁰)ᵀ is the normal equations m ∘ (w H) = m ∘ (w⁰ H), with m the
mask of the row. Every row has a matrix of its own, so they are solved together by conjugate gradients, which need only
products with H: one GEMM an iteration for all rows. The preconditioner is the diagonal of H.
"""

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the residual, relative to m ∘ (w⁰ H), in the norm of the preconditioner
LONGEST = 1000  # iterations


def refit(weights: Tensor, mask: Tensor, hessian: Tensor, start: Tensor) -> Tensor:
    """Return the least-squares values on the support.

    Args:
        weights: the dense weights, `(groups, rows, columns)`.
        mask: the support.
        hessian: positive definite, `(groups, columns, columns)`.
        start: weights to begin from; those off the support count as zero.
    """
    inverse = hessian.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(1)
    target = (weights @ hessian) * mask
    solution = start * mask
    residual = target - (solution @ hessian) * mask
    direction = residual * inverse
    energy = _energy(residual, inverse)
    enough = TOLERANCE**2 * _energy(target, inverse)
    for _ in range(LONGEST):
        active = energy > enough
        if not active.any():
            break
        image = (direction @ hessian) * mask
        step = torch.where(active, energy / (direction * image).sum(-1, keepdim=True), 0.0)
        solution += step * direction
        residual -= step * image
        before, energy = energy, _energy(residual, inverse)
        direction = residual * inverse + torch.where(active, energy / before, 0.0) * direction
    return solution


def _energy(residual: Tensor, inverse: Tensor) -> Tensor:
    return (residual * residual * inverse).sum(-1, keepdim=True)
