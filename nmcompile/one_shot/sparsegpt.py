"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): later columns make up for the weights that are pruned.

Columns are pruned in order. Pruning w_j of a row makes the least error if the columns after j take the optimal brain
surgeon's step, which needs the inverse Hessian of the columns from j on. With H⁻¹ = UᵀU and U upper triangular, row j
of U holds it (Algorithm 1 of the paper):

    score_j = w_j² / U_jj²    (1)
    e_j = w_j / U_jj if j is pruned, else 0    (2)
    w_k = w_k - e_j U_jk for k >= j    (3)

The mask of a run of M columns is chosen when the first of them is reached. Errors reach the columns after a panel in
one GEMM. Matrices are turned here, so that a column of the weight is contiguous.
"""

import torch
from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.select import Selector

PANEL = 128  # columns, as published


def sparsegpt(weights: Tensor, hessian: Hessian, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return the pruned weights and their mask."""
    factor = hessian.inverse_factor().to(weights.dtype)
    columns = (weights * hessian.used.unsqueeze(1)).mT.contiguous()
    mask = torch.empty_like(columns, dtype=torch.bool)
    panel = max(PANEL // choose.pattern.block, 1) * choose.pattern.block
    for start in range(0, columns.shape[1], panel):
        here, later = slice(start, start + panel), slice(start + panel, None)
        errors = _prune_panel(columns[:, here], mask[:, here], factor[:, here, here], choose)
        columns[:, later].baddbmm_(factor[:, here, later].mT, errors, alpha=-1)
    return (columns * mask).mT, mask.mT


def _prune_panel(columns: Tensor, mask: Tensor, factor: Tensor, choose: Selector) -> Tensor:
    """Prune the columns of a panel run by run, in place, and fill in the mask; return the errors."""
    errors = torch.empty_like(columns)
    for start in range(0, columns.shape[1], choose.pattern.block):
        run, later = slice(start, start + choose.pattern.block), slice(start + choose.pattern.block, None)
        _prune_run(columns[:, run], mask[:, run], factor[:, run, run], errors[:, run], choose)
        columns[:, later].baddbmm_(factor[:, run, later].mT, errors[:, run], alpha=-1)
    return errors


def _prune_run(columns: Tensor, mask: Tensor, factor: Tensor, errors: Tensor, choose: Selector) -> None:
    pivots = factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    mask.copy_(choose((columns / pivots).square().mT).mT)  # (1)
    for j in range(columns.shape[1]):
        errors[:, j] = (columns[:, j] / pivots[:, j]).masked_fill_(mask[:, j], 0.0)  # (2)
        columns[:, j:] -= factor[:, j, j:].unsqueeze(2) * errors[:, j].unsqueeze(1)  # (3)
