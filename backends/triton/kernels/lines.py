"""Pruning of a matrix along either dim, with its lines along that dim written one after another.

This is the layout of a sparse GEMM's operand. dY (tokens, out) pruned along tokens comes out as (out, tokens), so
nothing is transposed afterwards. A program takes a tile of blocks, consecutive blocks along its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.access import span
from nmcompile.backends.triton.kernels.kept_launches import launch
from nmcompile.backends.triton.kernels.launch import DRAWS, OPTIONS, TYPES, key_on, needs_int64, words
from nmcompile.backends.triton.kernels.operators import prune, prune_and_pack
from nmcompile.backends.triton.kernels.philox import uniforms, uniforms_one_by_one
from nmcompile.backends.triton.kernels.storage import join_blocks, split_blocks, to_float
from nmcompile.backends.triton.layout import LINES_TILE as TILE
from nmcompile.backends.triton.layout import Places
from nmcompile.backends.triton.support import KEEP
from nmcompile.pruning.pattern import NMPattern

REGISTERS = 128  # per thread; four programs then run at a time


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
    x: Tensor,
    operator: str,
    dim: int,
    key: Tensor | None,
    values: Tensor,
    positions: Tensor,
    places: Places | None = None,
    mask: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the matrix `x` pruned 2:4 along `dim` in packed form (see `nmcompile.pruning.packed`).

    Args:
        x: `(r, c)` as for `prune_lines`, but of any size; it counts as padded with zeros to the sizes of `values`.
        operator: as for `prune_lines`, or `KEEP` for an operand that is 2:4 already.
        dim, key: as for `prune_lines`.
        values: contiguous `(lines, length / 2)`, the dtype of `x`; `length` is a multiple of 8.
        positions: contiguous uint8, `(lines, length / 8)`, or the memory that `places` point into.
        places: where the positions of each block lie, if not in rows.
        mask: bool of the shape of `x`, any strides; elements outside it count as zeros.
        sums: `layout.empty_sums(x)`, for `dim` 0, to receive partial sums over the rows of `x` before it is pruned.
    """
    _launch(x, operator, NMPattern(2, 4), dim, key, values, positions, places, mask, sums)
    return values, positions


def _launch(
    x: Tensor,
    operator: str,
    pattern: NMPattern,
    dim: int,
    key: Tensor | None,
    values: Tensor,
    positions: Tensor | None,
    places: Places | None = None,
    mask: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    rows, columns = (triton.cdiv(size, pattern.block if index == dim else 1) for index, size in enumerate(x.shape))
    width = 2 if positions is not None else pattern.block
    lines, blocks = values.shape[0], values.shape[1] // width
    tiles = triton.cdiv(blocks if dim == 1 else lines, TILE[1]), triton.cdiv(lines if dim == 1 else blocks, TILE[0])
    with torch.cuda.device_of(x):
        launch(
            prune_lines_kernel,
            tiles[0] * tiles[1],
            words(x),
            None if mask is None else mask.view(torch.int8),
            words(values),
            positions,
            None if places is None else places.lines,
            None if places is None else places.blocks,
            sums,
            key_on(x.device, key),
            rows,
            columns,
            x.shape[dim],
            lines,
            blocks,
            x.stride(0),
            x.stride(1),
            0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(1),
            ALONG_ROWS=dim == 1,
            PACKED=positions is not None,
            PARTNER=0 if places is None else places.partner,
            ALIGNED=columns % 4 == 0,
            WIDE=needs_int64(x, values) or (mask is not None and needs_int64(mask)),
            OPERATOR=operator,
            DRAWS=0 if operator == KEEP else DRAWS[operator],
            N=pattern.n_keep,
            M=pattern.block,
            DTYPE=TYPES[x.dtype],
            R=TILE[0],
            C=TILE[1],
            maxnreg=REGISTERS,
            **OPTIONS,
        )


@triton.jit
def prune_lines_kernel(
    x,
    mask,
    values,
    positions,
    line_places,
    block_places,
    sums,
    key,
    rows,
    columns,
    length,
    lines,
    blocks,
    row_stride,
    column_stride,
    mask_row_stride,
    mask_column_stride,
    ALONG_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    PARTNER: tl.constexpr,
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
    tiles = tl.cdiv(blocks if ALONG_ROWS else lines, C)
    first_row = tl.program_id(0) // tiles * R
    first_column = tl.program_id(0) % tiles * C
    across = rows if ALONG_ROWS else columns
    bits = load_tile(x, first_row, first_column, across, length, row_stride, column_stride, ALONG_ROWS, WIDE, M, R, C)
    if mask is not None:
        strides = mask_row_stride, mask_column_stride
        flags = load_tile(mask, first_row, first_column, across, length, *strides, ALONG_ROWS, WIDE, M, R, C)
        bits = zero_where_unset(flags, bits)
    if sums is not None:
        store_sums(sums, bits, first_row, first_column, length, columns, DTYPE, R, C)
    u = ()
    if DRAWS > 0:
        u = tile_uniforms(first_row, first_column, columns, tl.load(key), DRAWS, ALIGNED, R, C)
    if ALONG_ROWS:
        first_line, first_block = first_row, first_column
    else:
        first_line, first_block = first_column, first_row
    if PACKED:
        pairs, nibbles = prune_and_pack(bits, u, OPERATOR, DTYPE)
        store_lines(values, pairs, 2, first_line, first_block, lines, blocks, ALONG_ROWS, WIDE, R, C)
        codes = in_lines(nibbles, ALONG_ROWS, R, C)
        if line_places is None:
            store_codes(positions, codes, first_line, first_block, lines, blocks, WIDE)
        else:
            places = line_places, block_places
            store_codes_at(positions, codes, first_line, first_block, lines, blocks, *places, PARTNER, WIDE)
    else:
        pruned = prune(bits, u, OPERATOR, N, DTYPE)
        store_lines(values, pruned, M, first_line, first_block, lines, blocks, ALONG_ROWS, WIDE, R, C)


@triton.jit
def load_tile(
    x,
    first_row,
    first_column,
    across,
    length,
    row_stride,
    column_stride,
    ALONG_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Load the M elements of the tile's blocks, `(R * C,)` each; zeros outside the `across` lines of `length`."""
    row = span(first_row, R, WIDE)
    column = span(first_column, C, WIDE)
    if ALONG_ROWS:
        element = span(first_column * M, C * M, WIDE)
        mask = (row < across)[:, None] & (element < length)[None, :]
        tile = tl.load(x + row[:, None] * row_stride + element[None, :] * column_stride, mask=mask, other=0)
        bits = split_blocks(tl.reshape(tile, (R * C, M)), M)
    else:
        bits = ()
        for i in tl.static_range(M):
            mask = (row * M + i < length)[:, None] & (column < across)[None, :]
            start = (row * M + i)[:, None] * row_stride + column[None, :] * column_stride
            bits = bits + (tl.reshape(tl.load(x + start, mask=mask, other=0), (R * C,)),)
    return bits


@triton.jit
def zero_where_unset(flags, bits):
    """Return the elements whose flag is not zero, zeros elsewhere."""
    masked = ()
    for i in tl.static_range(len(bits)):
        masked = masked + (tl.where(flags[i] != 0, bits[i], 0).to(bits[i].dtype),)
    return masked


@triton.jit
def store_sums(
    sums, bits, first_row, first_column, length, columns, DTYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Write the sums of the tile's columns, float32, into the tile's row of `sums`, if it is not of padding alone."""
    of_blocks = to_float(bits[0], DTYPE)
    for i in tl.static_range(1, len(bits)):
        of_blocks += to_float(bits[i], DTYPE)
    column = first_column + tl.arange(0, C)
    width = tl.where(first_row * len(bits) < length, columns, 0)
    start = sums + (first_row // R).to(tl.int64) * columns
    tl.store(start + column, tl.sum(tl.reshape(of_blocks, (R, C)), 0), mask=column < width)


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
    """Return the uniform numbers of the tile's blocks; block (r, c) of the matrix has the number r * columns + c."""
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
def in_lines(blocks, ALONG_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Return one number for each block of the tile, with one line per row."""
    tile = tl.reshape(blocks, (R, C))
    return tile if ALONG_ROWS else tl.trans(tile)


@triton.jit
def store_codes(out, codes, first_line, first_block, lines, blocks, WIDE: tl.constexpr):
    """Write four bits of each block into lines of blocks / 2 bytes."""
    L: tl.constexpr = codes.shape[0]
    B: tl.constexpr = codes.shape[1]
    even, odd = tl.split(tl.reshape(codes, (L, B // 2, 2)))
    line = span(first_line, L, WIDE)
    byte = span(first_block // 2, B // 2, WIDE)
    mask = (line < lines)[:, None] & (byte < blocks // 2)[None, :]
    start = line[:, None] * (blocks // 2) + byte[None, :]
    tl.store(out + start, (even | (odd << 4)).to(tl.uint8), mask=mask)


@triton.jit
def store_codes_at(
    out,
    codes,
    first_line,
    first_block,
    lines,
    blocks,
    line_places,
    block_places,
    PARTNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write four bits of each block to the place given by its line and its position in the line.

    The other half of a byte is the next block, or that of the line PARTNER further.
    """
    L: tl.constexpr = codes.shape[0]
    B: tl.constexpr = codes.shape[1]
    line = span(first_line, L, WIDE)
    block = span(first_block, B, WIDE)
    if PARTNER == 0:
        low, high = tl.split(tl.reshape(codes, (L, B // 2, 2)))
        block, _ = tl.split(tl.reshape(block, (B // 2, 2)))
    else:
        low, high = halves_of_lines(codes, PARTNER)
        line, _ = tl.split(
            tl.reshape(tl.trans(tl.reshape(line, (L // PARTNER // 2, 2, PARTNER)), (0, 2, 1)), (L // 2, 2))
        )
    in_line = block < blocks
    mask = (line < lines)[:, None] & in_line[None, :]
    at_line = tl.load(line_places + line, mask=line < lines, other=0)
    at_block = tl.load(block_places + block, mask=in_line, other=0)
    start = at_line[:, None] + at_block[None, :]
    tl.store(out + start, (low | (high << 4)).to(tl.uint8), mask=mask)


@triton.jit
def halves_of_lines(codes, PARTNER: tl.constexpr):
    """Return the lines whose partner is PARTNER further, and those partners."""
    L: tl.constexpr = codes.shape[0]
    B: tl.constexpr = codes.shape[1]
    pairs = tl.permute(tl.reshape(codes, (L // PARTNER // 2, 2, PARTNER, B)), (0, 2, 3, 1))
    low, high = tl.split(pairs)
    return tl.reshape(low, (L // 2, B)), tl.reshape(high, (L // 2, B))
