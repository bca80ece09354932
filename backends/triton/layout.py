"""Places of the blocks of a tensor in memory, with as few dims as its strides allow; and places of packed blocks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SECTOR = 16  # elements of 16 bits that a GPU moves at a time
LINES_TILE = (16, 64)  # blocks per program of `kernels.lines`: across the consecutive blocks, and along them


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of two tensors of one shape as a grid in C order, the order in which they are numbered.

    Block b has the coordinates of b in `sizes`; it starts at Σ coordinate * stride, and its elements are a step apart.

    Attributes:
        sizes: blocks along each dim of the grid.
        in_strides, out_strides: elements from one block to the next along each dim.
        in_step, out_step: elements from one element of a block to the next.
        axis: the dim of the grid along which the last block may be partial; -1 if all blocks are whole.
        length: the tensors' size along the blocks.
    """

    sizes: tuple[int, ...]
    in_strides: tuple[int, ...]
    out_strides: tuple[int, ...]
    in_step: int
    out_step: int
    axis: int
    length: int


class Places(NamedTuple):
    """An order of the indices of packed blocks, in which the byte of a block is at a sum of two numbers.

    Args:
        lines, blocks: integers, the summands of each line and of each block of a line.
        partner: whose indices are the high half of a byte: 0 for those of the next block, else of the block in the line
            that is as many lines further, a power of two up to 8.
    """

    lines: Tensor
    blocks: Tensor
    partner: int


class PackedForm(NamedTuple):
    """Memory for a packed matrix.

    Args:
        values: contiguous `(lines, length / 2)`.
        positions: uint8, the memory that the places point into.
        places: where the positions of each block lie.
    """

    values: Tensor
    positions: Tensor
    places: Places


def block_layout(x: Tensor, out: Tensor, dim: int, block: int) -> BlockLayout:
    """Lay out the blocks along `dim` (non-negative) of `x` and `out`, of any strides and at least one element."""
    length, partial = x.shape[dim], x.shape[dim] % block != 0
    dims: list[tuple[int, int, int]] = []
    axis = -1
    for index, size in enumerate(x.shape):
        in_stride, out_stride = x.stride(index), out.stride(index)
        if index == dim:
            size, in_stride, out_stride = -(-size // block), in_stride * block, out_stride * block
        pinned = partial and index == dim
        if size == 1 and not pinned:
            continue
        if dims and not pinned and axis != len(dims) - 1 and _follows(dims[-1], size, in_stride, out_stride):
            dims[-1] = dims[-1][0] * size, in_stride, out_stride
        else:
            dims.append((size, in_stride, out_stride))
        if pinned:
            axis = len(dims) - 1
    sizes, in_strides, out_strides = zip(*(dims or [(1, 0, 0)]), strict=True)
    return BlockLayout(sizes, in_strides, out_strides, x.stride(dim), out.stride(dim), axis, length)


def empty_sums(x: Tensor) -> Tensor:
    """Return the buffer for partial sums over the rows of a matrix: one row for each tile of blocks of four rows."""
    rows_per_tile = 4 * LINES_TILE[0]
    return x.new_empty(-(-x.shape[0] // rows_per_tile), x.shape[1], dtype=torch.float32)


def fast_dim(layout: BlockLayout, block: int) -> int | None:
    """Return the dim of the grid along which blocks are neighbours in memory, if it is not the last one.

    Blocks are numbered along the last dim. If they are neighbours in memory along another one, as in channels-last
    images, neighbouring threads should read along that one. None if reading along the last dim is as good: its blocks
    are neighbours too, no dim has neighbours, or that dim is shorter than one access to memory.
    """
    *others, last = range(len(layout.sizes))
    in_unit, out_unit = (block if step == 1 else 1 for step in (layout.in_step, layout.out_step))

    def is_fast(dim: int) -> bool:
        return (layout.in_strides[dim], layout.out_strides[dim]) == (in_unit, out_unit)

    fast = next(filter(is_fast, others), None)
    is_short = fast is None or layout.sizes[fast] * in_unit < SECTOR
    return None if is_fast(last) or is_short else fast


def _follows(outer: tuple[int, int, int], size: int, in_stride: int, out_stride: int) -> bool:
    """Return whether a dim continues where the one before it ends, in both tensors."""
    return outer[1] == size * in_stride and outer[2] == size * out_stride
