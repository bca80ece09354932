"""Prune blocks that are neighbours in memory across the order of their numbers, as those of channels-last images are.

The kernel of `blocks` gives neighbouring threads consecutive numbers, which lie far apart here. In this kernel they lie
side by side in memory, along the grid's fast dim, and each walks along the last dim, as far as a counter's words reach.
"""

from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmcompile.backends.triton.kernels.launch import DRAWS, OPTIONS, TYPES, is_tile, key_on, needs_int64, words
from nmcompile.backends.triton.kernels.operators import prune
from nmcompile.backends.triton.kernels.philox import consecutive_words, to_uniform
from nmcompile.backends.triton.kernels.storage import join_blocks, split_blocks
from nmcompile.backends.triton.layout import BlockLayout
from nmcompile.pruning.pattern import NMPattern

WALKS = 512  # of a program
WIDEST = 128  # walks side by side
SIDE = 4  # of them that a thread takes, to read and write 64 bits of a 16-bit type at a time
LARGEST_UNIT = 8


def prune_channels_last(
    x: Tensor, operator: str, pattern: NMPattern, key: Tensor | None, out: Tensor, layout: BlockLayout, fast: int
) -> None:
    """Write `x` pruned into `out`: see `blocks.prune_blocks`.

    Args:
        x, operator, pattern, key, out: as there.
        layout: of the blocks in `x` and `out`.
        fast: the dim of the grid along which blocks are neighbours in memory, not the last.
    """
    *outer, last = layout.sizes
    across, walk = outer.pop(fast), 4 // max(DRAWS[operator], 1)
    width = min(WIDEST, triton.next_power_of_2(across))
    rows = WALKS // width
    tiles = is_tile(layout.in_step, pattern), is_tile(layout.out_step, pattern)
    side = 1 if tiles[0] else gcd(SIDE, across)
    unit = _unit(layout, fast, tiles)
    with torch.cuda.device_of(x):
        channels_last_kernel[(prod(outer) * triton.cdiv(last, rows * walk) * triton.cdiv(across, width),)](
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
    """What strides are counted in: as much as divides them all, which tells the compiler how accesses are aligned."""
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
    PARTIAL: tl.constexpr = AXIS >= 0
    across = unsigned(tl.cdiv(sides * SIDE, C))
    along = unsigned(tl.cdiv(sizes[LAST], R * WALK))
    program = unsigned(tl.program_id(0))
    first_channel = (program % across).to(tl.int32) * C
    channel = span(first_channel, 1, C, WIDE)[None, :]
    position = span((program // across % along).to(tl.int32) * R * WALK, WALK, R, WIDE)[:, None]
    outer = program // across // along
    start_in, start_out, number, fast_weight, left = locate(
        outer, sizes, in_strides, out_strides, length, FAST, AXIS, M
    )
    x += start_in * UNIT
    out += start_out * UNIT
    if DRAWS > 0:
        u = walk_uniforms(number + position, first_channel, fast_weight, tl.load(key), ALIGNED, DRAWS, WALK, C, SIDE)
    for step in range(WALK):
        here = position + step
        inside = (here < sizes[LAST]) & (channel < sides * SIDE)
        if AXIS == LAST:
            left = length - here * M
        elif AXIS == FAST:
            left = length - channel * M
        at = here * in_strides[LAST] * UNIT + channel * IN_WIDTH
        bits = load_blocks(x, at, inside, left, in_step * UNIT, PARTIAL, IN_TILES, M)
        pruned = prune(bits, at_step(u, step) if DRAWS > 0 else (), OPERATOR, N, DTYPE)
        at = here * out_strides[LAST] * UNIT + channel * OUT_WIDTH
        store_blocks(out, at, inside, left, out_step * UNIT, pruned, PARTIAL, OUT_TILES, M)


@triton.jit
def unsigned(number):
    """Numbers that divide one another without a look at their signs."""
    return tl.full((), number, tl.uint32)


@triton.jit
def span(first, STEP: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """COUNT numbers, STEP apart."""
    index = first + tl.arange(0, COUNT) * STEP
    return index.to(tl.int64) if WIDE else index


@triton.jit
def locate(outer, sizes, in_strides, out_strides, length, FAST: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr):
    """Where the dims but the fast and the last one are at number `outer` of their grid.

    Returns:
        Offsets into both tensors; the number of the first block there; how far numbers are apart along the fast dim;
        and how many elements of its blocks there are, if one of those dims decides.
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


@triton.jit
def walk_uniforms(
    row_numbers,
    first_channel,
    fast_weight,
    key,
    ALIGNED: tl.constexpr,
    DRAWS: tl.constexpr,
    WALK: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The uniform numbers of `(R, C)` walks: for each step DRAWS tensors `(R * C,)`.

    They are worked out for every SIDE-th channel and then joined, because the compiler lays them out as the blocks are.
    """
    B: tl.constexpr = row_numbers.shape[0] * C // SIDE
    side_by_side = ()
    for i in tl.static_range(SIDE):
        channel = first_channel + i + SIDE * tl.arange(0, C // SIDE)[None, :]
        number = tl.reshape(row_numbers + channel * fast_weight, (B,))
        side_by_side = side_by_side + (consecutive_words(number * DRAWS, key, ALIGNED),)
    steps = ()
    for step in tl.static_range(WALK):
        draws = ()
        for draw in tl.static_range(DRAWS):
            u = ()
            for i in tl.static_range(SIDE):
                u = u + (to_uniform(side_by_side[i][step * DRAWS + draw]),)
            draws = draws + (u[0] if SIDE == 1 else tl.reshape(join_blocks(u, SIDE), (B * SIDE,)),)
        steps = steps + (draws,)
    return steps


@triton.jit
def at_step(u, step):
    """The uniform numbers of one step."""
    result = u[0]
    for i in tl.static_range(1, len(u)):
        later = ()
        for draw in tl.static_range(len(result)):
            later = later + (tl.where(step == i, u[i][draw], result[draw]),)
        result = later
    return result


@triton.jit
def load_blocks(x, start, inside, left, step, PARTIAL: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr):
    """The M elements of `(R, C)` blocks, `(R * C,)` each, zeros where there are none."""
    B: tl.constexpr = start.shape[0] * start.shape[1]
    if TILES:
        tile = tl.load(x + tile_offsets(start, M), mask=tile_mask(inside, left, PARTIAL, M), other=0)
        bits = split_blocks(tl.reshape(tile, (B, M)), M)
    else:
        bits = ()
        for i in tl.static_range(M):
            mask = inside & (i < left) if PARTIAL else inside
            bits = bits + (tl.reshape(tl.load(x + i * step + start, mask=mask, other=0), (B,)),)
    return bits


@triton.jit
def store_blocks(out, start, inside, left, step, pruned, PARTIAL: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr):
    """Write the M elements of blocks, those that there are."""
    if TILES:
        tile = tl.reshape(join_blocks(pruned, M), (start.shape[0], start.shape[1], M))
        tl.store(out + tile_offsets(start, M), tile, mask=tile_mask(inside, left, PARTIAL, M))
    else:
        for i in tl.static_range(M):
            mask = inside & (i < left) if PARTIAL else inside
            tl.store(out + i * step + start, tl.reshape(pruned[i], start.shape), mask=mask)


@triton.jit
def tile_offsets(start, M: tl.constexpr):
    return tl.expand_dims(start, 2) + tl.arange(0, M)[None, None, :]


@triton.jit
def tile_mask(inside, left, PARTIAL: tl.constexpr, M: tl.constexpr):
    mask = tl.expand_dims(inside, 2)
    if PARTIAL:
        mask = mask & (tl.arange(0, M)[None, None, :] < tl.expand_dims(left, 2))
    return mask
