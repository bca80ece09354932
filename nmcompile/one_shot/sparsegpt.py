"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): later columns make up for what is pruned and rounded away.

Columns are pruned in order. Pruning w_j of a row makes the least error if the columns after j take the optimal brain
surgeon's step, which needs the inverse Hessian of the columns from j on. With H⁻¹ = UᵀU and U upper triangular, row j
of U holds it (Algorithm 1 of the paper):

    score_j = w_j² / U_jj²    (1)
    e_j = (w_j - v_j) / U_jj    (2)
    w_k = w_k - e_j U_jk for k > j    (3)

Here v_j is the value that is stored: 0 if j is pruned, else w_j, or the nearest value on the grid of a quantized weight
(Section 3.5 of the paper; without pruning that is GPTQ). The mask of a run of M columns is chosen when the first of
them is reached. Errors reach the columns after a panel in one GEMM. Matrices are turned here, so that a column of the
weight is contiguous.
"""

import torch
from torch import Tensor

from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.rounding import Round, exactly
from nmcompile.one_shot.select import Selector

PANEL = 128  # columns, as published
RUN = 4  # columns where no mask is chosen


def sparsegpt(weights: Tensor, hessian: Hessian, choose: Selector, round: Round = exactly) -> tuple[Tensor, Tensor]:
    """Return the pruned and rounded weights, and their mask."""
    mask = torch.empty_like(weights, dtype=torch.bool)
    return _Columns(weights, mask, hessian, round, choose).solve(), mask


def round_kept(weights: Tensor, mask: Tensor, hessian: Hessian, round: Round) -> Tensor:
    """Return the weights pruned by a mask that is known, and rounded."""
    return _Columns(weights, mask, hessian, round, None).solve()


class _Columns:
    """The columns of a weight, of which those after the present one change; and their mask, filled in if not known."""

    def __init__(self, weights: Tensor, mask: Tensor, hessian: Hessian, round: Round, choose: Selector | None) -> None:
        self.values = (weights * hessian.used.unsqueeze(1)).mT.contiguous()
        self.mask = mask.mT
        self.factor = hessian.inverse_factor().to(weights.dtype)
        self.errors = torch.empty_like(self.values)
        self.round = round
        self.choose = choose
        self.run = RUN if choose is None else choose.pattern.block

    def solve(self) -> Tensor:
        """Prune and round all columns, panel by panel."""
        count, panel = self.values.shape[1], max(PANEL // self.run, 1) * self.run
        for start in range(0, count, panel):
            end = min(start + panel, count)
            for first in range(start, end, self.run):
                last = min(first + self.run, end)
                self._solve_run(first, last)
                self._spread(first, last, end)
            self._spread(start, end, count)
        return self.values.mT

    def _solve_run(self, first: int, last: int) -> None:
        run = slice(first, last)
        pivots = self.factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
        if self.choose is not None:
            self.mask[:, run] = self.choose((self.values[:, run] / pivots[:, run]).square().mT).mT  # (1)
        for j in range(first, last):
            stored = self.round(self.values[:, j].unsqueeze(2)).squeeze(2) * self.mask[:, j]
            self.errors[:, j] = (self.values[:, j] - stored) / pivots[:, j]  # (2)
            self.values[:, j] = stored
            self._spread(j, j + 1, last)

    def _spread(self, first: int, last: int, end: int) -> None:
        """Take the errors of some columns out of those from `last` on, up to `end`."""
        change = self.factor[:, first:last, last:end].mT
        self.values[:, last:end].baddbmm_(change, self.errors[:, first:last], alpha=-1)  # (3)
