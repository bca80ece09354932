"""Pruning and rounding of a weight together, on the grid that fits what pruning alone would leave."""

from torch import Tensor

from nmcompile.ir.layers import Layer
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.refit_on_grid import refit_on_grid
from nmcompile.one_shot.rounding import Rounding
from nmcompile.one_shot.select import Selector
from nmcompile.one_shot.sparsegpt import round_kept, sparsegpt


def fit_grid(rounding: Rounding, pruned: Tensor, hessian: Hessian) -> Rounding:
    """Return the grid for weights that are pruned: errors count as in the step of the optimal brain surgeon."""
    pivots = hessian.inverse_factor().diagonal(dim1=1, dim2=2)
    return rounding.fitted(pruned, (hessian.used / pivots.square()).to(pruned.dtype))


def solve_on_grid(
    layer: Layer, dense: Tensor, hessian: Hessian, mask: Tensor | Selector, rounding: Rounding, refit: bool
) -> tuple[Tensor, Tensor]:
    """Return weights on a grid and their mask.

    Args:
        layer: the layer.
        dense: its dense weights, `(groups, rows, columns)`.
        hessian: of its inputs.
        mask: a mask that stands, or how masks are chosen while columns are rounded.
        rounding: the grid.
        refit: whether integers are changed in the end as long as that lowers the error.
    """
    round = rounding.of(layer)
    if isinstance(mask, Selector):
        rounded, mask = sparsegpt(dense, hessian, mask, round)
    else:
        rounded = round_kept(dense, mask, hessian, round)
    if refit:
        rounded = refit_on_grid(dense, mask, hessian.damped().to(dense.dtype), rounded, round)
    return rounded, mask
