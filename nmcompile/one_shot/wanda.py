"""Wanda (Sun et al. 2023, arXiv 2306.11695): weights by magnitude times the norm of their input."""

from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.select import Selector


def wanda(weights: Tensor, hessian: Hessian, choose: Selector) -> Tensor:
    """Return the mask of the largest |W_ij| ||X_j||, Equation (1); kept weights are unchanged."""
    norms = hessian.mean().diagonal(dim1=1, dim2=2).sqrt().to(weights.dtype)
    return choose(weights.abs() * norms.unsqueeze(1))
