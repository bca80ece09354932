"""Better integers for the weights that a mask keeps, one column at a time.

With G = (W - W⁰) H, the best value of w_j while all others of its row stand is w_j - G_j / H_jj, and the loss grows
with the square of the distance from it: its best value on a grid is the nearest one. Each step lowers the loss or
leaves it, and moves all rows at once; the sweeps over the columns end when a whole one changes nothing.
"""

from torch import Tensor

from nmcompile.one_shot.rounding import Round

PANEL = 128  # columns; the gradients of later ones are brought up to date in one GEMM
MOST = 20  # sweeps


def refit_on_grid(weights: Tensor, mask: Tensor, hessian: Tensor, start: Tensor, round: Round) -> Tensor:
    """Return values on the grid that no change of a single weight improves, or those after `MOST` sweeps.

    Args:
        weights: the dense weights, `(groups, rows, columns)`.
        mask: the support.
        hessian: positive definite, `(groups, columns, columns)`.
        start: values on the grid, zero off the support.
        round: to the grid.
    """
    # Matrices are turned, so that a column of the weight is contiguous.
    solution, dense, kept = (one.mT.contiguous() for one in (start, weights, mask))
    for _ in range(MOST):
        before = solution.clone()
        for first in range(0, solution.shape[1], PANEL):
            here = slice(first, first + PANEL)
            gradient = hessian[:, here] @ (solution - dense)
            _sweep(solution[:, here], gradient, kept[:, here], hessian[:, here, here], round)
        if before.equal(solution):
            break
    return solution.mT


def _sweep(solution: Tensor, gradient: Tensor, kept: Tensor, hessian: Tensor, round: Round) -> None:
    """Move the columns of a panel, one after another, in place."""
    curvature = hessian.diagonal(dim1=1, dim2=2).unsqueeze(2)
    for j in range(solution.shape[1]):
        best = solution[:, j] - gradient[:, j] / curvature[:, j]
        value = round(best.unsqueeze(2)).squeeze(2) * kept[:, j]
        gradient += hessian[:, :, j].unsqueeze(2) * (value - solution[:, j]).unsqueeze(1)
        solution[:, j] = value
