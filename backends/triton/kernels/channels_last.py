"""Pruning of blocks whose neighbours in memory do not have consecutive numbers, as in channels-last images.

`blocks` gives neighbouring threads consecutive blocks, which lie far apart here. In this kernel neighbouring threads
read neighbours in memory, along the fast dim of the grid. Each walks along the last dim, as far as the random words of
one counter reach.
"""

from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.access import is_tile, load_blocks, store_blocks
from nmcompile.backends.triton.kernels.kept_launches import launch
from nmcompile.backends.triton.kernels.launch import DRAWS, OPTIONS, TYPES, key_on, needs_int64, words
from nmcompile.backends.triton.kernels.operators import prune
from nmcompile.backends.triton.kernels.philox import at_step, uniforms_of_walks
from nmcompile.backends.triton.layout import BlockLayout
from nmcompile.pruning.pattern import NMPattern

WALKS = 512  # walks per program
WIDEST = 128  # walks per program along the fast dim
SIDE = 4  # walks side by side per thread, which then reads and writes 64 bits of a 16-bit type at a time
LARGEST_UNIT = 8


def prune_channels_last(
    x: Tensor, operator: str, pattern: NMPattern, key: Tensor | None, out: Tensor, layout: BlockLayout, fast: int
) -> None:
    """Write `x` pruned into `out`: see `blocks.prune_blocks`.

    Args:
        x, operator, pattern, key, out: as there.
        layout: the layout of the blocks in `x` and `out`.
        fast: the dim that `layout.fast_dim` finds.
    """
    *outer, last = layout.sizes
    across, walk = outer.pop(fast), 4 // max(DRAWS[operator], 1)
    width = min(WIDEST, triton.next_power_of_2(across))
    rows = WALKS // width
    tiles = is_tile(layout.in_step, pattern), is_tile(layout.out_step, pattern)
    side = 1 if tiles[0] else gcd(SIDE, across)
    unit = _unit(layout, fast, tiles)
    with torch.cuda.device_of(x):
        launch(
            channels_last_kernel,
            prod(outer) * triton.cdiv(last, rows * walk) * triton.cdiv(across, width),
            words(x),
            words(out),
            key_on(x.device, key),
            layout.sizes,
            tuple(stride // unit for stride in layout.in_strides),
            tuple(stride // unit for stride in layout.out_strides),
            layout.in_step // unit,
            layout.out_step // unit,
            layout.length,
            across // side,
            FAST=fast,
            AXIS=layout.axis,
            IN_WIDTH=layout.in_strides[fast],
            OUT_WIDTH=layout.out_strides[fast],
            IN_TILES=tiles[0],
            OUT_TILES=tiles[1],
            UNIT=unit,
            ALIGNED=last % walk == 0,
            WIDE=needs_int64(x, out),
            OPERATOR=operator,
            DRAWS=DRAWS[operator],
            N=pattern.n_keep,
            M=pattern.block,
            DTYPE=TYPES[x.dtype],
            WALK=walk,
            R=rows,
            C=width,
            SIDE=side,
            **OPTIONS,
        )


def _unit(layout: BlockLayout, fast: int, tiles: tuple[bool, bool]) -> int:
    """Return the unit of strides and steps, which divides them all: it tells the compiler how accesses are aligned."""
    strides = [s for strides in (layout.in_strides, layout.out_strides) for d, s in enumerate(strides) if d != fast]
    steps = [step for step, is_tile in zip((layout.in_step, layout.out_step), tiles, strict=True) if not is_tile]
    return gcd(LARGEST_UNIT, *strides, *steps)


@triton.jit
def channels_last_kernel(
    x,
    out,
    key,
    sizes,
    in_strides,
    out_strides,
    in_step,
    out_step,
    length,
    sides,
    FAST: tl.constexpr,
    AXIS: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    IN_TILES: tl.constexpr,
    OUT_TILES: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    OPERATOR: tl.constexpr,
    DRAWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    WALK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
):
    LAST: tl.constexpr = len(sizes) - 1
    across = unsigned(tl.cdiv(sides * SIDE, C))
    along = unsigned(tl.cdiv(sizes[LAST], R * WALK))
    program = unsigned(tl.program_id(0))
    first_channel = (program % across).to(tl.int32) * C
    first_position = (program // across % along).to(tl.int32) * (R * WALK)
    place = locate(program // across // along, sizes, in_strides, out_strides, length, FAST, AXIS, M)
    start_in, start_out, number, fast_weight, left = place
    x += start_in * UNIT
    out += start_out * UNIT
    channel = span(first_channel, 1, C, WIDE)[None, :]
    first = span(first_position, WALK, R, WIDE)[:, None]
    if DRAWS > 0:
        weights = fast_weight, tl.load(key)
        u = uniforms_of_walks(number + first, first_channel, *weights, ALIGNED, DRAWS, WALK, C, SIDE)
    for step in range(WALK):
        position = first + step
        elements = left
        if AXIS == LAST:
            elements = length - position * M
        elif AXIS == FAST:
            elements = length - channel * M
        inside = (position < sizes[LAST]) & (channel < sides * SIDE)
        elements = tl.where(inside, elements, 0)
        start = position * in_strides[LAST] * UNIT + channel * IN_WIDTH
        bits = load_blocks(x, start, elements, in_step * UNIT, AXIS >= 0, IN_TILES, M)
        pruned = prune(bits, at_step(u, step) if DRAWS > 0 else (), OPERATOR, N, DTYPE)
        start = position * out_strides[LAST] * UNIT + channel * OUT_WIDTH
        store_blocks(out, start, elements, out_step * UNIT, pruned, AXIS >= 0, OUT_TILES, M)


@triton.jit
def unsigned(number):
    """Return a number that is divided without a look at its sign."""
    return tl.full((), number, tl.uint32)


@triton.jit
def span(first, STEP: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """Return COUNT numbers, STEP apart, int64 if WIDE."""
    index = first + tl.arange(0, COUNT) * STEP
    return index.to(tl.int64) if WIDE else index


@triton.jit
def locate(outer, sizes, in_strides, out_strides, length, FAST: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr):
    """Find the place `outer` in the grid of all dims except the fast and the last one.

    Returns:
        Its offsets in both tensors, in units; the number of its first block; the difference of the numbers of two
        neighbours along the fast dim; and how many elements its blocks have, if one of those dims decides on that.
    """
    OUTERMOST: tl.constexpr = 1 if FAST == 0 else 0
    start_in = tl.full((), 0, tl.int64)
    start_out = start_in
    number = start_in
    weight = tl.full((), 1, tl.int64) * sizes[len(sizes) - 1]
    fast_weight = weight
    left = tl.full((1, 1), M, tl.int32)
    for dim in tl.static_range(len(sizes) - 2, -1, -1):
        if dim == FAST:
            fast_weight = weight
        else:
            coordinate = (outer if dim == OUTERMOST else outer % unsigned(sizes[dim])).to(tl.int64)
            outer = outer // unsigned(sizes[dim])
            start_in += coordinate * in_strides[dim]
            start_out += coordinate * out_strides[dim]
            number += coordinate * weight
            if dim == AXIS:
                left = tl.full((1, 1), length - coordinate * M, tl.int32)
        weight = weight * sizes[dim]
    return start_in, start_out, number, fast_weight, left
