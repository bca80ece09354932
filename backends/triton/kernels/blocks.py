"""Prune blocks along any dim of a tensor of any strides, in one pass: read once, written once.

A program takes consecutive blocks. Along a strided axis, element i of neighbouring blocks lies side by side and is one
load; along a contiguous axis, whole blocks do, and a tile of them is loaded and split.
"""

import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.launch import DRAWS, OPTIONS, TYPES, key_on, needs_int64, words
from nmcompile.backends.triton.kernels.operators import select
from nmcompile.backends.triton.kernels.philox import uniforms
from nmcompile.backends.triton.kernels.storage import join_blocks, split_blocks
from nmcompile.backends.triton.layout import BlockLayout, block_layout
from nmcompile.pruning import NMPattern

BLOCKS = 512  # of a program; a multiple of 4, the uniform numbers of a counter


def prune_blocks(x: Tensor, operator: str, pattern: NMPattern, dim: int, key: Tensor | None, out: Tensor) -> Tensor:
    """Write `x` pruned along `dim` into `out`, bit for bit what the operator of `nmcompile.pruning` gives.

    Args:
        x: float32, bfloat16 or float16 of any shape and strides, with at least one element.
        operator: a name in `DRAWS`.
        pattern: any N:M with M <= 8.
        dim: non-negative.
        key: 0-d int64; `None` for the operators that draw nothing.
        out: shape and dtype of `x`, any strides without overlap.
    """
    layout = block_layout(x, out, dim, pattern.block)
    blocks = x.numel() // x.shape[dim] * -(-x.shape[dim] // pattern.block)
    prune_blocks_kernel[(triton.cdiv(blocks, BLOCKS),)](
        words(x),
        words(out),
        key_on(x.device, key),
        layout.sizes,
        layout.in_strides,
        layout.out_strides,
        layout.in_step,
        layout.out_step,
        layout.length,
        blocks,
        AXIS=layout.axis,
        IN_TILES=_in_tiles(layout.in_step, pattern),
        OUT_TILES=_in_tiles(layout.out_step, pattern),
        ALIGNED=_starts_on_blocks(layout, pattern),
        WIDE=needs_int64(x, out) or blocks > 2**30,
        OPERATOR=operator,
        DRAWS=DRAWS[operator],
        N=pattern.n_keep,
        M=pattern.block,
        DTYPE=TYPES[x.dtype],
        B=BLOCKS,
        **OPTIONS,
    )
    return out


def _in_tiles(step: int, pattern: NMPattern) -> bool:
    return step == 1 and pattern.block in (2, 4, 8)


def _starts_on_blocks(layout: BlockLayout, pattern: NMPattern) -> bool:
    return all(stride % pattern.block == 0 for stride in (*layout.in_strides, *layout.out_strides))


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
    ALIGNED: tl.constexpr,
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
    start_in, start_out, left = locate(block, sizes, in_strides, out_strides, length, AXIS, M)
    left = tl.where(block < blocks, left, 0)
    if ALIGNED:
        start_in = tl.multiple_of(start_in, M)
        start_out = tl.multiple_of(start_out, M)
    bits = load_blocks(x, start_in, left, in_step, IN_TILES, M)
    u = ()
    if DRAWS > 0:
        u = uniforms(first * DRAWS // 4 + tl.arange(0, B * DRAWS // 4), tl.load(key), DRAWS)
    kept, values = select(bits, u, OPERATOR, N, DTYPE)
    store_blocks(out, start_out, left, out_step, kept, values, OUT_TILES, M)


@triton.jit
def locate(block, sizes, in_strides, out_strides, length, AXIS: tl.constexpr, M: tl.constexpr):
    """Where blocks start in both tensors, and how many of their elements there are: M, but in a partial last block."""
    start_in = tl.zeros_like(block)
    start_out = tl.zeros_like(block)
    left = tl.full(block.shape, M, block.dtype)
    rest = block
    for back in tl.static_range(len(sizes)):
        dim: tl.constexpr = len(sizes) - 1 - back
        coordinate = rest
        if dim > 0:
            coordinate = rest % sizes[dim]
            rest = rest // sizes[dim]
        start_in += coordinate * in_strides[dim]
        start_out += coordinate * out_strides[dim]
        if dim == AXIS:
            left = length - coordinate * M
    return start_in, start_out, left


@triton.jit
def load_blocks(x, start, left, step, TILES: tl.constexpr, M: tl.constexpr):
    """The M elements of blocks, zeros where there are none."""
    if TILES:
        i = tl.arange(0, M)[None, :]
        bits = split_blocks(tl.load(x + start[:, None] + i, mask=i < left[:, None], other=0), M)
    else:
        bits = ()
        for i in tl.static_range(M):
            bits = bits + (tl.load(x + start + i * step, mask=i < left, other=0),)
    return bits


@triton.jit
def store_blocks(out, start, left, step, kept, values, TILES: tl.constexpr, M: tl.constexpr):
    """The values where kept, zeros elsewhere."""
    pruned = ()
    for i in tl.static_range(M):
        pruned = pruned + (tl.where(kept[i], values[i], 0).to(values[i].dtype),)
    if TILES:
        i = tl.arange(0, M)[None, :]
        tl.store(out + start[:, None] + i, join_blocks(pruned, M), mask=i < left[:, None])
    else:
        for i in tl.static_range(M):
            tl.store(out + start + i * step, pruned[i], mask=i < left)
