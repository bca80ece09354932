"""Pruning of blocks along any dim of a tensor of any strides, in one pass: read once, written once.

A program takes consecutive blocks. Along a strided axis, element i of neighbouring blocks lies side by side and is one
load. Along a contiguous axis whole blocks lie side by side, and a tile of them is loaded and split.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.access import is_tile, load_blocks, store_blocks
from nmcompile.backends.triton.kernels.channels_last import prune_channels_last
from nmcompile.backends.triton.kernels.kept_launches import launch
from nmcompile.backends.triton.kernels.launch import DRAWS, OPTIONS, TYPES, key_on, needs_int64, words
from nmcompile.backends.triton.kernels.operators import prune
from nmcompile.backends.triton.kernels.philox import uniforms
from nmcompile.backends.triton.layout import BlockLayout, block_layout, fast_dim
from nmcompile.pruning.pattern import NMPattern

BLOCKS = 512  # blocks per program; a multiple of 4, the uniform numbers per counter
PAIRS = 2048  # blocks of two per program


def prune_blocks(x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None, out: Tensor) -> Tensor:
    """Write `x` pruned along `dim` into `out`, bit for bit as the operator of `nmcompile.pruning`.

    Args:
        x: float32, bfloat16 or float16 of any shape and strides, with at least one element.
        operator: a name in `DRAWS`.
        pattern: any N:M with M <= 8.
        dim: non-negative.
        key: 0-d int64; `None` for the operators that draw nothing.
        out: shape and dtype of `x`, any strides without overlap.
    """
    layout = block_layout(x, out, dim, pattern.block)
    fast = fast_dim(layout, pattern.block)
    if fast is None:
        prune_by_number(x, operator, pattern, key, out, layout)
    else:
        prune_channels_last(x, operator, pattern, key, out, layout, fast)
    return out


def prune_by_number(
    x: Tensor, operator: str, pattern: NMPattern, key: Tensor | None, out: Tensor, layout: BlockLayout
) -> None:
    blocks = prod(layout.sizes)
    unit = _unit(layout, pattern)
    at_a_time = PAIRS if pattern.block == 2 else BLOCKS
    with torch.cuda.device_of(x):
        launch(
            prune_blocks_kernel,
            triton.cdiv(blocks, at_a_time),
            words(x),
            words(out),
            key_on(x.device, key),
            layout.sizes,
            tuple(stride // unit for stride in layout.in_strides),
            tuple(stride // unit for stride in layout.out_strides),
            layout.in_step,
            layout.out_step,
            layout.length,
            blocks,
            AXIS=layout.axis,
            IN_TILES=is_tile(layout.in_step, pattern),
            OUT_TILES=is_tile(layout.out_step, pattern),
            UNIT=unit,
            WIDE=needs_int64(x, out) or blocks > 2**30,
            OPERATOR=operator,
            DRAWS=DRAWS[operator],
            N=pattern.n_keep,
            M=pattern.block,
            DTYPE=TYPES[x.dtype],
            B=at_a_time,
            **OPTIONS,
        )


def _unit(layout: BlockLayout, pattern: NMPattern) -> int:
    """Return the unit of the strides: whole blocks if possible, which tells the compiler how blocks are aligned."""
    whole = all(stride % pattern.block == 0 for stride in (*layout.in_strides, *layout.out_strides))
    return pattern.block if whole else 1


@triton.jit
def prune_blocks_kernel(
    x,
    out,
    key,
    sizes,
    in_strides,
    out_strides,
    in_step,
    out_step,
    length,
    blocks,
    AXIS: tl.constexpr,
    IN_TILES: tl.constexpr,
    OUT_TILES: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    OPERATOR: tl.constexpr,
    DRAWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    B: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * B
    block = first + tl.arange(0, B)
    if not WIDE:
        block = block.to(tl.int32)
    start_in, start_out, left = locate(block, sizes, in_strides, out_strides, length, AXIS, UNIT, M)
    left = tl.where(block < blocks, left, 0)
    bits = load_blocks(x, start_in, left, in_step, AXIS >= 0, IN_TILES, M)
    u = ()
    if DRAWS > 0:
        u = uniforms(first * DRAWS // 4 + tl.arange(0, B * DRAWS // 4), tl.load(key), DRAWS)
    pruned = prune(bits, u, OPERATOR, N, DTYPE)
    store_blocks(out, start_out, left, out_step, pruned, AXIS >= 0, OUT_TILES, M)


@triton.jit
def locate(
    block,
    sizes,
    in_strides,
    out_strides,
    length,
    AXIS: tl.constexpr,
    UNIT: tl.constexpr,
    M: tl.constexpr,
):
    """Return where blocks start in both tensors, and their number of elements: M, or fewer in a partial last block."""
    start_in = tl.zeros_like(block)
    start_out = tl.zeros_like(block)
    left = tl.full(block.shape, M, block.dtype)
    rest = block
    for dim in tl.static_range(len(sizes) - 1, -1, -1):
        coordinate = rest
        if dim > 0:
            coordinate = rest % sizes[dim]
            rest = rest // sizes[dim]
        start_in += coordinate * in_strides[dim]
        start_out += coordinate * out_strides[dim]
        if dim == AXIS:
            left = length - coordinate * M
    return start_in * UNIT, start_out * UNIT, left
