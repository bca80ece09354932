"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): columns in order, later ones make up for pruned weights.

Pruning weight j of a row w makes the least error if the columns after j move by the optimal brain surgeon's step,
Equation (3) of the paper. With H⁻¹ = UᵀU, U upper triangular, row j of U holds all that column j needs, Equations (4)
and (5):

    score = w_j² / U_jj²        error e_j = w_j / U_jj if j is pruned, else 0        w_k -= e_j U_jk for k > j

Errors reach the columns after a panel in one GEMM. Weights are stored by columns, so that a column is contiguous.
"""

import torch
from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.select import Selector

PANEL = 128  # columns, as published


def sparsegpt(weights: Tensor, hessian: Hessian, choose: Selector) -> tuple[Tensor, Tensor]:
    """Return the pruned weights and their mask; a run of M columns is chosen when the first of them is reached."""
    factor = hessian.inverse_factor().to(weights.dtype)
    columns = (weights * hessian.used.unsqueeze(1)).mT.contiguous()
    mask = torch.empty_like(columns, dtype=torch.bool)
    block = choose.pattern.block
    panel = max(PANEL // block, 1) * block
    for start in range(0, columns.shape[1], panel):
        end = min(start + panel, columns.shape[1])
        here, later = slice(start, end), slice(end, None)
        errors = _prune_panel(columns[:, here], mask[:, here], factor[:, here, here], choose)
        columns[:, later].baddbmm_(factor[:, here, later].mT, errors, alpha=-1)
    return (columns * mask).mT, mask.mT


def _prune_panel(columns: Tensor, mask: Tensor, factor: Tensor, choose: Selector) -> Tensor:
    """Choose and update the columns of a panel run by run, in place; return the errors."""
    errors = torch.zeros_like(columns)
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    block = choose.pattern.block
    for start in range(0, columns.shape[1], block):
        run, later = slice(start, start + block), slice(start + block, None)
        mask[:, run] = choose((columns[:, run] / diagonal[:, run]).square().mT).mT
        for j in range(start, min(start + block, columns.shape[1])):
            errors[:, j] = (columns[:, j] / diagonal[:, j]).masked_fill(mask[:, j], 0.0)
            columns[:, j : start + block] -= factor[:, j, j : start + block].unsqueeze(2) * errors[:, j].unsqueeze(1)
        columns[:, later].baddbmm_(factor[:, run, later].mT, errors[:, run], alpha=-1)
    return errors
