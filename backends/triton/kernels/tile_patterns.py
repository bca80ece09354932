"""The exact transposable 2:4 mask of 4 x 4 tiles, as `nmcompile.pruning.tile_enumeration` finds it, ties and all.

A tile is a tuple of 16 tensors, and each half is eight of them; a half's mask is eight bits, element i of the half in
bit i. The tables below are unrolled while compiling: no kernel reads them.
"""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import infinity, magnitude, to_float
from nmcompile.pruning.tile_enumeration import halves

_HALVES = halves(2, 4, 2)
_CLASSES = sorted(set(_HALVES.values()))
_LEFT = {counts: tuple(2 - count for count in counts) for counts in _CLASSES}

HALVES = tl.constexpr(len(_HALVES))
CLASSES = tl.constexpr(len(_CLASSES))
COLUMNS = tl.constexpr(tuple((*half[0], *half[1]) for half in _HALVES))
"""Kept columns of the halves in lexicographic order: two of the upper row, two of the lower one."""
MASKS = tl.constexpr(tuple(sum(1 << (4 * row + c) for row in (0, 1) for c in half[row]) for half in _HALVES))
CLASS = tl.constexpr(tuple(_CLASSES.index(counts) for counts in _HALVES.values()))
"""Class of each half: the halves of a class keep equally many elements in every column."""
FITTING = tl.constexpr(tuple(_CLASSES.index(_LEFT[counts]) for counts in _HALVES.values()))
"""Class of the bottom halves that complete each top half."""
BOUND = tl.constexpr(3.4028234663852886e38 / 16)  # 16 of these have a finite sum


@triton.jit
def best_pattern(a):
    """Return the mask of the largest sum of magnitudes: the bits of the top half and of the bottom half, int32."""
    bottom_sums, bottom_masks = best_bottoms(a)
    best = tl.full(a[0].shape, -1.0, tl.float32)
    top = tl.zeros(a[0].shape, tl.int32)
    bottom = top
    for half in tl.static_range(HALVES):
        candidate = half_sum(a, 0, half) + bottom_sums[FITTING[half]]
        better = candidate > best
        best = tl.where(better, candidate, best)
        top = tl.where(better, MASKS[half], top)
        bottom = tl.where(better, bottom_masks[FITTING[half]], bottom)
    return top, bottom


@triton.jit
def best_bottoms(a):
    """Return for every class the largest sum of a bottom half, and its mask; ties go to the first half."""
    sums = ()
    masks = ()
    for one in tl.static_range(CLASSES):
        best = tl.full(a[0].shape, -1.0, tl.float32)
        mask = tl.zeros(a[0].shape, tl.int32)
        for half in tl.static_range(HALVES):
            if CLASS[half] == one:
                candidate = half_sum(a, 8, half)
                mask = tl.where(candidate > best, MASKS[half], mask)
                best = tl.maximum(candidate, best)
        sums = sums + (best,)
        masks = masks + (mask,)
    return sums, masks


@triton.jit
def half_sum(a, FIRST: tl.constexpr, HALF: tl.constexpr):
    """Add the kept elements of the upper row, then those of the lower one, and return the sum of both."""
    upper = a[FIRST + COLUMNS[HALF][0]] + a[FIRST + COLUMNS[HALF][1]]
    lower = a[FIRST + 4 + COLUMNS[HALF][2]] + a[FIRST + 4 + COLUMNS[HALF][3]]
    return upper + lower


@triton.jit
def tile_magnitudes(bits, DTYPE: tl.constexpr):
    """Return |w|, float32 and finite, as `nmcompile.pruning.tiles.tile_magnitudes` does, but without a branch."""
    largest = tl.zeros(bits[0].shape, tl.float32)
    ordinary = largest == 0.0
    for i in tl.static_range(16):
        a = tl.abs(to_float(bits[i], DTYPE))
        finite = magnitude(bits[i], DTYPE) < infinity(DTYPE)
        largest = tl.maximum(largest, tl.where(finite, a, 0.0))
        ordinary = ordinary & (a <= BOUND)
    scale = tl.where(ordinary | (largest == 0.0), 1.0, largest)
    result = ()
    for i in tl.static_range(16):
        a = tl.abs(to_float(bits[i], DTYPE))
        finite = magnitude(bits[i], DTYPE) < infinity(DTYPE)
        result = result + (tl.where(finite, tl.div_rn(a, scale), 32.0),)
    return result
