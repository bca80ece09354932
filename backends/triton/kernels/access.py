"""Loads and stores of blocks, as element i of all of them, side by side, or as tiles of whole blocks."""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import join_blocks, split_blocks
from nmcompile.pruning.pattern import NMPattern


def is_tile(step: int, pattern: NMPattern) -> bool:
    """Return whether blocks lie whole in memory, so that a tile of them is one access."""
    return step == 1 and pattern.block in (2, 4, 8)


@triton.jit
def load_blocks(x, start, left, step, PARTIAL: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr):
    """Load the M elements of blocks, each flat, with zeros past the end.

    Args:
        start: where each block starts, of any shape.
        left: how many elements of it there are, 0 for a block that does not exist, and of the shape of `start`.
        step: from one element to the next.
        PARTIAL: whether a block may have less than M elements.
        TILES: see `is_tile`.
    """
    if TILES:
        tile = tl.load(x + tile_offsets(start, M), mask=tile_mask(left, PARTIAL, M), other=0)
        bits = split_blocks(tl.reshape(tile, (start.numel, M)), M)
    else:
        bits = ()
        for i in tl.static_range(M):
            element = tl.load(x + element_offset(i, step) + start, mask=i < left, other=0)
            bits = bits + (tl.reshape(element, (start.numel,)),)
    return bits


@triton.jit
def store_blocks(out, start, left, step, pruned, PARTIAL: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr):
    """Write the M elements of blocks, except those past the end; see `load_blocks`."""
    if TILES:
        offsets = tile_offsets(start, M)
        tile = tl.reshape(join_blocks(pruned, M), offsets.shape)
        tl.store(out + offsets, tile, mask=tile_mask(left, PARTIAL, M))
    else:
        for i in tl.static_range(M):
            element = tl.reshape(pruned[i], start.shape)
            tl.store(out + element_offset(i, step) + start, element, mask=i < left)


@triton.jit
def element_offset(i: tl.constexpr, step):
    """Return the offset of element i, which may exceed 32 bits even where those of blocks do not."""
    return tl.full((), step, tl.int64) * i


@triton.jit
def tile_offsets(start, M: tl.constexpr):
    return tl.expand_dims(start, -1) + tl.arange(0, M)


@triton.jit
def tile_mask(left, PARTIAL: tl.constexpr, M: tl.constexpr):
    """Return a mask that is equal for all elements of a whole block, which then is one memory access."""
    left = tl.expand_dims(left, -1)
    return tl.arange(0, M) < left if PARTIAL else left > 0


@triton.jit
def load_tiles(
    x,
    first_row,
    first_column,
    rows,
    columns,
    row_stride,
    column_stride,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Load the 16 elements of R x C tiles, `(R * C,)` each; zeros outside the matrix."""
    column = span(first_column, 4 * C, WIDE)
    elements = ()
    for i in tl.static_range(4):
        row = first_row + i + 4 * span(0, R, WIDE)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        line = tl.load(x + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0)
        elements = elements + split_blocks(tl.reshape(line, (R * C, 4)), 4)
    return elements


@triton.jit
def span(first, LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """Return LENGTH consecutive indices, int64 if WIDE."""
    index = first + tl.arange(0, LENGTH)
    return index.to(tl.int64) if WIDE else index
