"""A 2:4 weight packed along its rows and along its columns, for the forward and the backward GEMM, in one pass.

The weight and its mask are read once. A program takes a region of 4 x 4 tiles, whose rows are blocks of one packed
form, and whose columns are blocks of the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.access import load_tiles, span
from nmcompile.backends.triton.kernels.kept_launches import launch
from nmcompile.backends.triton.kernels.launch import OPTIONS, TYPES, needs_int64, words
from nmcompile.backends.triton.kernels.lines import store_codes_at, zero_where_unset
from nmcompile.backends.triton.kernels.packing import pack_pairs
from nmcompile.backends.triton.kernels.storage import join_blocks
from nmcompile.backends.triton.layout import PackedForm

REGION = (16, 16)  # tiles per program: down and across


def pack_both(w: Tensor, mask: Tensor, along_rows: PackedForm, along_columns: PackedForm) -> None:
    """Write a matrix packed as `lines.pack_lines` packs it with `KEEP`, along dim 1 and along dim 0.

    Args:
        w: `(r, c)` float32, bfloat16 or float16, any strides, at least one element.
        mask: bool of the shape of `w`, any strides, transposable 2:4; elements outside it count as zeros.
        along_rows, along_columns: the memory of both forms.
    """
    down = max(len(along_rows.values), 2 * along_columns.values.shape[1])
    across = max(len(along_columns.values), 2 * along_rows.values.shape[1])
    forms = [(words(form.values), form.positions, *form.places[:2]) for form in (along_rows, along_columns)]
    with torch.cuda.device_of(w):
        launch(
            pack_both_kernel,
            triton.cdiv(down, 4 * REGION[0]) * triton.cdiv(across, 4 * REGION[1]),
            words(w),
            mask.view(torch.int8),
            *forms[0],
            *forms[1],
            *w.shape,
            *w.stride(),
            *mask.stride(),
            *(size for form in (along_rows, along_columns) for size in form.values.shape),
            triton.cdiv(across, 4 * REGION[1]),
            ROW_PARTNER=along_rows.places.partner,
            COLUMN_PARTNER=along_columns.places.partner,
            WIDE=needs_int64(w, mask, along_rows.values, along_columns.values),
            DTYPE=TYPES[w.dtype],
            R=REGION[0],
            C=REGION[1],
            **OPTIONS,
        )


@triton.jit
def pack_both_kernel(
    w,
    mask,
    row_values,
    row_positions,
    row_lines,
    row_blocks,
    column_values,
    column_positions,
    column_lines,
    column_blocks,
    rows,
    columns,
    row_stride,
    column_stride,
    mask_row_stride,
    mask_column_stride,
    packed_rows,
    packed_row_width,
    packed_columns,
    packed_column_width,
    across,
    ROW_PARTNER: tl.constexpr,
    COLUMN_PARTNER: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    first_row = tl.program_id(0) // across * (4 * R)
    first_column = tl.program_id(0) % across * (4 * C)
    bits = load_tiles(w, first_row, first_column, rows, columns, row_stride, column_stride, WIDE, R, C)
    strides = mask_row_stride, mask_column_stride
    bits = zero_where_unset(load_tiles(mask, first_row, first_column, rows, columns, *strides, WIDE, R, C), bits)
    row_codes = ()
    column_codes = ()
    for i in tl.static_range(4):
        pair, code = pack_pairs((bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]), DTYPE)
        line = first_row + i + 4 * span(0, R, WIDE)
        values = tl.reshape(join_blocks(pair, 2), (R, 2 * C))
        store_values(row_values, values, line, first_column // 2, packed_rows, packed_row_width, WIDE)
        row_codes = row_codes + (code,)
    for j in tl.static_range(4):
        pair, code = pack_pairs((bits[j], bits[j + 4], bits[j + 8], bits[j + 12]), DTYPE)
        line = first_column + j + 4 * span(0, C, WIDE)
        values = tl.reshape(tl.permute(tl.reshape(join_blocks(pair, 2), (R, C, 2)), (1, 0, 2)), (C, 2 * R))
        store_values(column_values, values, line, first_row // 2, packed_columns, packed_column_width, WIDE)
        column_codes = column_codes + (code,)
    codes = tl.reshape(tl.permute(tl.reshape(join_blocks(row_codes, 4), (R, C, 4)), (0, 2, 1)), (4 * R, C))
    ends = packed_rows, packed_row_width // 2
    places = row_lines, row_blocks
    store_codes_at(row_positions, codes, first_row, first_column // 4, *ends, *places, ROW_PARTNER, WIDE)
    codes = tl.reshape(tl.permute(tl.reshape(join_blocks(column_codes, 4), (R, C, 4)), (1, 2, 0)), (4 * C, R))
    ends = packed_columns, packed_column_width // 2
    places = column_lines, column_blocks
    store_codes_at(column_positions, codes, first_column, first_row // 4, *ends, *places, COLUMN_PARTNER, WIDE)


@triton.jit
def store_values(out, values, line, first, lines, width, WIDE: tl.constexpr):
    """Write values into these lines of a contiguous `(lines, width)` matrix, from column `first` on."""
    column = span(first, values.shape[1], WIDE)
    inside = (line < lines)[:, None] & (column < width)[None, :]
    tl.store(out + line[:, None] * width + column[None, :], values, mask=inside)
