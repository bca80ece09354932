"""Prune a matrix along either dim, and write its lines along that dim one after another: the layout of a sparse GEMM's
operand. dY (tokens, out) pruned along tokens comes out as (out, tokens), so that nothing is transposed afterwards.

A program takes a tile of blocks, consecutive blocks along its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.launch import DRAWS, OPTIONS, TYPES, key_on, needs_int64, words
from nmcompile.backends.triton.kernels.operators import select, zero_where_pruned
from nmcompile.backends.triton.kernels.packing import pack_pairs
from nmcompile.backends.triton.kernels.philox import uniforms, uniforms_one_by_one
from nmcompile.backends.triton.kernels.storage import join_blocks, split_blocks
from nmcompile.pruning import NMPattern

TILE = (16, 32)  # blocks of a program: across the consecutive blocks, and along them


def prune_lines(x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None, out: Tensor) -> Tensor:
    """Write the matrix `x` pruned along `dim` into `out`, its lines along `dim` as rows.

    Args:
        x: `(r, c)` float32, bfloat16 or float16, any strides, at least one element; the size along `dim` is a multiple
            of M.
        operator: a name in `DRAWS`.
        pattern: N:M with M = 2, 4 or 8.
        dim: 0 or 1.
        key: 0-d int64; `None` for the operators that draw nothing.
        out: contiguous, the dtype of `x`; `(c, r)` for `dim` 0, `(r, c)` for 1.
    """
    _launch(x, operator, pattern, dim, key, out, None)
    return out


def pack_lines(
    x: Tensor, operator: str, dim: int, key: Tensor | None, values: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the matrix `x` pruned 2:4 along `dim` in packed form (see `nmcompile.pruning.packed`).

    Args:
        x: `(r, c)` as for `prune_lines`; the size along `dim`, called length below, is a multiple of 8.
        operator, dim, key: as for `prune_lines`.
        values: contiguous `(lines, length / 2)`, the dtype of `x`.
        positions: contiguous `(lines, length / 8)` uint8.
    """
    _launch(x, operator, NMPattern(2, 4), dim, key, values, positions)
    return values, positions


def _launch(
    x: Tensor,
    operator: str,
    pattern: NMPattern,
    dim: int,
    key: Tensor | None,
    values: Tensor,
    positions: Tensor | None,
) -> None:
    rows, columns = (size // (pattern.block if index == dim else 1) for index, size in enumerate(x.shape))
    grid = triton.cdiv(columns, TILE[1]), triton.cdiv(rows, TILE[0])
    with torch.cuda.device_of(x):
        prune_lines_kernel[(grid[0] * grid[1],)](
            words(x),
            words(values),
            positions,
            key_on(x.device, key),
            rows,
            columns,
            x.stride(0),
            x.stride(1),
            ALONG_ROWS=dim == 1,
            PACKED=positions is not None,
            ALIGNED=columns % 4 == 0,
            WIDE=needs_int64(x, values),
            OPERATOR=operator,
            DRAWS=DRAWS[operator],
            N=pattern.n_keep,
            M=pattern.block,
            DTYPE=TYPES[x.dtype],
            R=TILE[0],
            C=TILE[1],
            **OPTIONS,
        )


@triton.jit
def prune_lines_kernel(
    x,
    values,
    positions,
    key,
    rows,
    columns,
    row_stride,
    column_stride,
    ALONG_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    OPERATOR: tl.constexpr,
    DRAWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    tiles = tl.cdiv(columns, C)
    first_row = tl.program_id(0) // tiles * R
    first_column = tl.program_id(0) % tiles * C
    bits = load_tile(x, first_row, first_column, rows, columns, row_stride, column_stride, ALONG_ROWS, WIDE, M, R, C)
    u = ()
    if DRAWS > 0:
        u = tile_uniforms(first_row, first_column, columns, tl.load(key), DRAWS, ALIGNED, R, C)
    kept, emitted = select(bits, u, OPERATOR, N, DTYPE)
    if ALONG_ROWS:
        lines, first_line, blocks, first_block = rows, first_row, columns, first_column
    else:
        lines, first_line, blocks, first_block = columns, first_column, rows, first_row
    pruned = zero_where_pruned(kept, emitted)
    if PACKED:
        pairs, nibbles = pack_pairs(pruned, DTYPE)
        store_lines(values, pairs, 2, first_line, first_block, lines, blocks, ALONG_ROWS, WIDE, R, C)
        store_positions(positions, nibbles, first_line, first_block, lines, blocks, ALONG_ROWS, WIDE, R, C)
    else:
        store_lines(values, pruned, M, first_line, first_block, lines, blocks, ALONG_ROWS, WIDE, R, C)


@triton.jit
def load_tile(
    x,
    first_row,
    first_column,
    rows,
    columns,
    row_stride,
    column_stride,
    ALONG_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The M elements of the tile's blocks, `(R * C,)` each; zeros outside the matrix."""
    row = span(first_row, R, WIDE)
    column = span(first_column, C, WIDE)
    if ALONG_ROWS:
        element = span(first_column * M, C * M, WIDE)
        mask = (row < rows)[:, None] & (element < columns * M)[None, :]
        tile = tl.load(x + row[:, None] * row_stride + element[None, :] * column_stride, mask=mask, other=0)
        bits = split_blocks(tl.reshape(tile, (R * C, M)), M)
    else:
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        bits = ()
        for i in tl.static_range(M):
            start = (row * M + i)[:, None] * row_stride + column[None, :] * column_stride
            bits = bits + (tl.reshape(tl.load(x + start, mask=mask, other=0), (R * C,)),)
    return bits


@triton.jit
def tile_uniforms(
    first_row,
    first_column,
    columns,
    key,
    DRAWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The uniform numbers of the tile's blocks; block (r, c) of the matrix has the number r * columns + c."""
    first = span(first_row, R, True)[:, None] * columns + first_column
    if ALIGNED:
        u = uniforms(first * DRAWS // 4 + tl.arange(0, C * DRAWS // 4)[None, :], key, DRAWS)
    else:
        u = uniforms_one_by_one(first + tl.arange(0, C)[None, :], key, DRAWS)
    flat = ()
    for i in tl.static_range(DRAWS):
        flat = flat + (tl.reshape(u[i], (R * C,)),)
    return flat


@triton.jit
def store_lines(
    out,
    elements,
    WIDTH: tl.constexpr,
    first_line,
    first_block,
    lines,
    blocks,
    ALONG_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Write WIDTH elements of each block into lines of WIDTH * blocks."""
    L: tl.constexpr = R if ALONG_ROWS else C
    B: tl.constexpr = C if ALONG_ROWS else R
    tile = tl.reshape(join_blocks(elements, WIDTH), (R, C, WIDTH))
    if not ALONG_ROWS:
        tile = tl.permute(tile, (1, 0, 2))
    line = span(first_line, L, WIDE)
    element = span(first_block * WIDTH, B * WIDTH, WIDE)
    mask = (line < lines)[:, None] & (element < blocks * WIDTH)[None, :]
    start = line[:, None] * (blocks * WIDTH) + element[None, :]
    tl.store(out + start, tl.reshape(tile, (L, B * WIDTH)), mask=mask)


@triton.jit
def store_positions(
    out,
    nibbles,
    first_line,
    first_block,
    lines,
    blocks,
    ALONG_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Write four bits of each block into lines of blocks / 2 bytes."""
    L: tl.constexpr = R if ALONG_ROWS else C
    B: tl.constexpr = C if ALONG_ROWS else R
    tile = tl.reshape(nibbles, (R, C))
    if not ALONG_ROWS:
        tile = tl.trans(tile)
    even, odd = tl.split(tl.reshape(tile, (L, B // 2, 2)))
    line = span(first_line, L, WIDE)
    byte = span(first_block // 2, B // 2, WIDE)
    mask = (line < lines)[:, None] & (byte < blocks // 2)[None, :]
    start = line[:, None] * (blocks // 2) + byte[None, :]
    tl.store(out + start, (even | (odd << 4)).to(tl.uint8), mask=mask)


@triton.jit
def span(first, LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """LENGTH consecutive indices, int64 where WIDE."""
    index = first + tl.arange(0, LENGTH)
    return index.to(tl.int64) if WIDE else index
