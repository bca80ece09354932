"""One product with a sparse operand: padded, compressed, multiplied by the library."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cusparselt.algorithms import best_algorithm
from nmcompile.backends.cusparselt.both_directions import both_directions
from nmcompile.backends.cusparselt.cost import predicted_speedup
from nmcompile.backends.cusparselt.kept_weights import is_kept, kept_for
from nmcompile.backends.cusparselt.library import Library
from nmcompile.backends.cusparselt.operand import Operand, compressed
from nmcompile.backends.cusparselt.plans import ALIGNMENT, Plan, Problem, kept_plan
from nmcompile.backends.cusparselt.support import Sizes, operand_refusal, paddings


@dataclass(frozen=True)
class Product:
    """The product `sparse @ dense + bias` for a sparse `(rows, depth)` and a dense `(depth, lanes)` matrix.

    Args:
        library: that multiplies.
        sparse: the operand that keeps two of four along its depth.
        dense: `(depth, lanes)` if `by_depth`, else `(lanes, depth)`.
        bias: `(rows,)`.
        by_depth: see `dense`.
        by_rows: the result is `(rows, lanes)`, else `(lanes, rows)`.
        weight: the weight of which the sparse operand is a view, if its compressed form may be cached.
    """

    library: Library
    sparse: Operand
    dense: Tensor
    bias: Tensor | None = None
    by_depth: bool = False
    by_rows: bool = False
    weight: Tensor | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.sparse.rows, self.sparse.depth, self.dense.shape[1 if self.by_depth else 0])

    @property
    def problem(self) -> Hashable:
        """Return everything that decides the time of the product."""
        operand, strides = self.sparse, (self.sparse.matrix.stride(), self.dense.stride())
        work = operand.operator, operand.pattern, operand.dim, operand.mask is None, is_kept(self.weight, operand.mask)
        form = self.by_depth, self.by_rows, self.bias is None, operand.sums is None
        return self.library.name, self.sizes, strides, work, (*form, self.dense.dtype, str(self.dense.device))

    def predicted_speedup(self) -> float | None:
        """Return dense time / sparse time by the cost model."""
        return predicted_speedup(self.sizes, self.sparse, is_kept(self.weight, self.sparse.mask))

    def refusal(self) -> str:
        """Return why the library cannot multiply these operands; empty if it can."""
        bias = () if self.bias is None else (self.bias,)
        return operand_refusal(self.library, self.sparse.matrix, self.dense, *bias)

    def multiply(self) -> Tensor | None:
        """Multiply by the library; None if no algorithm is correct, or a graph is captured and there is no plan."""
        for sizes in paddings(self.sizes):
            if (plan := self.plan(sizes)) is not None:
                return self.run_plan(plan, sizes)
        return None

    def plan(self, sizes: Sizes) -> Plan | None:
        """Return the plan for sizes that `paddings` returns; None as `multiply`."""
        form = self.by_depth, self.by_rows, self.bias is not None
        problem = Problem(*sizes, *form, self.dense.dtype, self.dense.device)
        algorithm = best_algorithm(self.library, problem)
        return None if algorithm is None else kept_plan(self.library, problem, algorithm)

    def run_plan(self, plan: Plan, sizes: Sizes) -> Tensor:
        """Multiply by a plan for these sizes."""
        given, bias = self.sizes, self.bias
        if bias is not None and sizes.rows > given.rows:
            bias = F.pad(bias, (0, sizes.rows - given.rows))
        result = plan.run(self._compressed(sizes), self._dense(sizes), bias)
        if sizes == given:
            return result
        rows, lanes = given.rows, given.lanes
        return (result[:rows, :lanes] if self.by_rows else result[:lanes, :rows]).contiguous()

    def _dense(self, sizes: Sizes) -> Tensor:
        shape = (sizes.depth, sizes.lanes) if self.by_depth else (sizes.lanes, sizes.depth)
        matrix = _pad(self.dense, *shape).contiguous()
        return matrix.clone() if matrix.data_ptr() % ALIGNMENT else matrix

    def _compressed(self, sizes: Sizes) -> Tensor:
        operand, size = self.sparse, (sizes.rows, sizes.depth)
        if self.weight is None:
            return both_directions(self.library).for_backward(operand, size)
        if not is_kept(self.weight, operand.mask):
            return both_directions(self.library).for_forward(operand, size)
        kept = kept_for(self.library)
        return kept.compressed(self.weight, operand.mask, size, lambda: compressed(self.library, operand, *size))


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    missing = rows - x.shape[0], columns - x.shape[1]
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def by_rows(x: Tensor, channel_dim: int) -> Tensor:
    """Return a matrix with a row for every position; a view if channels are last in memory."""
    return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])


def by_channels(rows: Tensor, like: Tensor, channels: int) -> Tensor:
    """Return the rows as an image of the size and memory format of `like`, with other channels."""
    samples, _, *spatial = like.shape
    return rows.view(samples, *spatial, channels).movedim(-1, 1).contiguous(memory_format=memory_format(like))


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels last, or contiguous for all others."""
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
