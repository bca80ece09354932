"""Masks by score, which leave the kept weights as they are.

Wanda (Sun et al. 2023, arXiv 2306.11695) scores a weight by its magnitude times the norm of its input, Equation (1).
"""

from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.select import Selector


def magnitude(weights: Tensor, hessian: Hessian, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return the weights of the largest |w|, and their mask."""
    mask = choose(weights.abs())
    return weights * mask, mask


def wanda(weights: Tensor, hessian: Hessian, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return the weights of the largest |w| ||x||, and their mask."""
    norms = hessian.second_moments().diagonal(dim1=1, dim2=2).sqrt().to(weights.dtype)
    mask = choose(weights.abs() * norms.unsqueeze(1))
    return weights * mask, mask
