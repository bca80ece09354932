"""Transposable 2:4 weights: the exact mask of every 4 x 4 tile, found and applied in one pass over the weight.

The pruned weight is written as is for the forward GEMM, transposed for the backward GEMM, or both; so is the mask. A
program takes a region of tiles and so writes both orientations in long pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.access import load_tiles, span
from nmcompile.backends.triton.kernels.kept_launches import launch
from nmcompile.backends.triton.kernels.launch import OPTIONS, TYPES, needs_int64, words
from nmcompile.backends.triton.kernels.storage import join_blocks
from nmcompile.backends.triton.kernels.tile_patterns import best_pattern, tile_magnitudes

REGION = (8, 16)  # tiles per program: down and across


def prune_tiles(
    w: Tensor, *, out: Tensor | None = None, transposed: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Write a matrix pruned by its exact transposable 2:4 mask into those outputs that are given.

    Args:
        w: `(r, c)` float32, bfloat16 or float16, any strides, at least one element. A partial tile counts as padded
            with zeros.
        out: the pruned matrix, contiguous `(r, c)`, the dtype of `w`.
        transposed: the pruned matrix transposed, contiguous `(c, r)`, the dtype of `w`.
        mask: contiguous `(r, c)` bool.
    """
    rows, columns = w.shape
    across = triton.cdiv(columns, 4 * REGION[1])
    with torch.cuda.device_of(w):
        launch(
            prune_tiles_kernel,
            triton.cdiv(rows, 4 * REGION[0]) * across,
            words(w),
            None if out is None else words(out),
            None if transposed is None else words(transposed),
            None if mask is None else mask.view(torch.int8),
            rows,
            columns,
            w.stride(0),
            w.stride(1),
            WIDE=needs_int64(w) or w.numel() > 2**30,
            DTYPE=TYPES[w.dtype],
            R=REGION[0],
            C=REGION[1],
            **OPTIONS,
        )


@triton.jit
def prune_tiles_kernel(
    w,
    out,
    transposed,
    mask,
    rows,
    columns,
    row_stride,
    column_stride,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    across = tl.cdiv(columns, 4 * C)
    first_row = tl.program_id(0) // across * (4 * R)
    first_column = tl.program_id(0) % across * (4 * C)
    bits = load_tiles(w, first_row, first_column, rows, columns, row_stride, column_stride, WIDE, R, C)
    kept = kept_elements(tile_magnitudes(bits, DTYPE))
    if mask is not None:
        store_rows(mask, kept, first_row, first_column, rows, columns, WIDE, R, C)
    pruned = ()
    for i in tl.static_range(16):
        pruned = pruned + (tl.where(kept[i] != 0, bits[i], 0).to(bits[i].dtype),)
    if out is not None:
        store_rows(out, pruned, first_row, first_column, rows, columns, WIDE, R, C)
    if transposed is not None:
        store_columns(transposed, pruned, first_row, first_column, rows, columns, WIDE, R, C)


@triton.jit
def kept_elements(a):
    """Return 1 for the elements that the mask keeps, 0 for the others: 16 int8 tensors."""
    top, bottom = best_pattern(a)
    kept = ()
    for i in tl.static_range(8):
        kept = kept + (((top >> i) & 1).to(tl.int8),)
    for i in tl.static_range(8):
        kept = kept + (((bottom >> i) & 1).to(tl.int8),)
    return kept


@triton.jit
def store_rows(out, tile, first_row, first_column, rows, columns, WIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Write tiles into a contiguous matrix, a row of every tile at a time."""
    column = span(first_column, 4 * C, WIDE)
    for i in tl.static_range(4):
        line = join_blocks((tile[4 * i], tile[4 * i + 1], tile[4 * i + 2], tile[4 * i + 3]), 4)
        row = first_row + i + 4 * span(0, R, WIDE)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(out + row[:, None] * columns + column[None, :], tl.reshape(line, (R, 4 * C)), mask=inside)


@triton.jit
def store_columns(
    out, tile, first_row, first_column, rows, columns, WIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Write tiles into a contiguous transposed matrix, a column of every tile at a time."""
    row = span(first_row, 4 * R, WIDE)
    for i in tl.static_range(4):
        line = tl.reshape(join_blocks((tile[i], tile[i + 4], tile[i + 8], tile[i + 12]), 4), (R, C, 4))
        column = first_column + i + 4 * span(0, C, WIDE)
        inside = (column < columns)[:, None] & (row < rows)[None, :]
        line = tl.reshape(tl.permute(line, (1, 0, 2)), (C, 4 * R))
        tl.store(out + column[:, None] * rows + row[None, :], line, mask=inside)
