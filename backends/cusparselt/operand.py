"""The sparse operand of a product, and its compression.

The library's own function takes as long as a large product. So a kernel of ours masks or prunes and compresses in one
pass, once it is known where the library expects the indices. Its first use checks that it writes the same bytes.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cusparselt.compress import compress
from nmcompile.backends.cusparselt.layout import Layout, find_layout
from nmcompile.backends.cusparselt.library import Library
from nmcompile.backends.triton.layout import PackedForm
from nmcompile.backends.triton.operators import triton_prune
from nmcompile.backends.triton.support import KEEP, runs_on, triton_support
from nmcompile.pruning.pattern import NMPattern

SIZES = 512  # sizes whose layouts are cached
TWO_OF_FOUR = NMPattern(2, 4)
PACKED = frozenset({"greedy", "mvue", "mvue_approx"})  # the operators that kernels compress with


class Operand(NamedTuple):
    """A matrix that keeps two of four along a dim after masking and pruning. Its lines along that dim are the rows.

    Args:
        matrix: `(r, c)`, any strides.
        dim: 0 or 1.
        mask: bool like the matrix; None keeps all.
        operator: a name in `nmcompile.pruning.OPERATORS`, or `KEEP`.
        pattern: the operator's pattern.
        key: for its draws, 0-d int64.
        sums: `empty_sums(matrix)`, for dim 0, to receive partial sums over the rows of the matrix before it is pruned.
    """

    matrix: Tensor
    dim: int
    mask: Tensor | None = None
    operator: str = KEEP
    pattern: NMPattern = TWO_OF_FOUR
    key: Tensor | None = None
    sums: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.matrix.shape[1 - self.dim]

    @property
    def depth(self) -> int:
        return self.matrix.shape[self.dim]

    def pruned(self) -> Tensor:
        """Return the matrix with its zeros."""
        masked = self.matrix if self.mask is None else torch.where(self.mask, self.matrix, 0.0)
        if self.operator == KEEP:
            return masked
        pruned: Tensor = triton_prune(
            masked, self.operator, self.pattern.n_keep, self.pattern.block, self.dim, self.key
        )
        return pruned


def compressed(library: Library, operand: Operand, rows: int, depth: int) -> Tensor:
    """Return the operand in the library's format, with zeros appended up to that size."""
    matrix = operand.matrix
    layout = checked_layout(library, rows, depth, matrix.dtype, matrix.device)
    if layout is None:
        _sum_alone(operand)
        lines = operand.pruned().movedim(operand.dim, 1)
        padded = F.pad(lines, (0, depth - lines.shape[1], 0, rows - lines.shape[0]))
        return compress(library, padded.contiguous())
    if operand.operator != KEEP and (operand.operator not in PACKED or operand.pattern != TWO_OF_FOUR):
        _sum_alone(operand)
        operand = Operand(operand.pruned(), operand.dim)
    return _write(operand, rows, depth, layout)


def packed_form(library: Library, rows: int, depth: int, like: Tensor) -> PackedForm | None:
    """Return memory for a compressed matrix of the dtype and the device of `like`; None without a known layout."""
    layout = checked_layout(library, rows, depth, like.dtype, like.device)
    return None if layout is None else _empty(layout, rows, depth, like)


@lru_cache(SIZES)
def checked_layout(library: Library, rows: int, depth: int, dtype: torch.dtype, device: torch.device) -> Layout | None:
    """Return the layout of compressed matrices of that size; None if our kernel writes other bytes than the library."""
    if not (triton_support().ok and runs_on(device)):
        return None
    layout = find_layout(rows, depth, dtype, device, partial(compress, library))
    if layout is None:
        return None
    dice = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(rows, depth, device=device, dtype=dtype, generator=dice)
    greedy = Operand(matrix, 1, operator="greedy")
    ours, theirs = _write(greedy, rows, depth, layout), compress(library, greedy.pruned())
    return layout if torch.equal(ours, theirs) else None


def _write(operand: Operand, rows: int, depth: int, layout: Layout) -> Tensor:
    from nmcompile.backends.triton.kernels.lines import pack_lines

    matrix, dim, mask = operand.matrix.detach(), operand.dim, operand.mask
    out = _empty(layout, rows, depth, matrix)
    if matrix.stride(0) == 1 and operand.operator == KEEP:  # neighbours in memory are read together
        matrix, dim, mask = matrix.t(), 1 - dim, None if mask is None else mask.t()
    pack_lines(matrix, operand.operator, dim, operand.key, *out, mask, operand.sums)
    return out.positions


def _empty(layout: Layout, rows: int, depth: int, like: Tensor) -> PackedForm:
    out = torch.empty(layout.size, dtype=torch.uint8, device=like.device)
    if layout.filler is not None:
        out[layout.start :].fill_(layout.filler)
    return PackedForm(out[: layout.start].view(like.dtype).view(rows, depth // 2), out, layout.places)


def _sum_alone(operand: Operand) -> None:
    """Sum in a pass of its own, where no kernel of ours reads the matrix before it is pruned."""
    if operand.sums is not None:
        operand.sums[1:] = 0
        torch.sum(operand.matrix, 0, dtype=torch.float32, out=operand.sums[0])
