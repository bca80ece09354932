"""MVUE 2:4 of ordinary blocks, in a third of the operations that N:M takes (`operators.select_mvue`).

GPUs add and multiply floats at twice the rate at which they compare, select and shift. So comparisons become the floats
0 and 1, and the kept elements are a sum of them. A block is ordinary, and gets exactly the reference's result, if only
its saturated elements differ from zero, or if

- exactly two elements are kept: no threshold, pushed by rounding past the end or onto the other's element, has to take
  the nearest free one, nor are two elements saturated beside others;
- the sum of its magnitudes is finite, and large enough for an exact half;
- u >= 2**-22: the second round of water-filling then changes nothing. It saturates an element only where the others
  vanish in the sum, each and together at most 2**-24 of it. The threshold is above those before the element, so the
  draw takes it too, and emits it with the sum, which is its own magnitude.

One finite block in a million is not ordinary. If a tile has any, `operators` takes the general path for all of it.
"""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.packing import pack_kept
from nmcompile.backends.triton.kernels.selection import running_sums, total
from nmcompile.backends.triton.kernels.storage import exact_bits, rounded, to_float

SMALL = tl.constexpr(2.0**-100)
UNUSUAL_BELOW = tl.constexpr(2.0**-22)
PAIRS = tl.constexpr(0b0001_0110_0110_1000)  # bit m: whether m has two bits
INTEGERS = tl.constexpr(2.0**23)  # a float32 of this and a small integer holds the integer in its low bits
SIGN = tl.constexpr(-0x80000000)


@triton.jit
def draw_pair(bits, u, DTYPE: tl.constexpr):
    """Draw the elements that MVUE keeps of blocks of four.

    Returns:
        The blocks as float32; an int32 with bit i set for each kept element i; the magnitude from which elements are
        saturated; the magnitude that the others are emitted with; and which blocks are not ordinary.
    """
    x = ()
    a = ()
    for i in tl.static_range(4):
        x = x + (to_float(bits[i], DTYPE),)
        a = a + (tl.abs(x[i]),)
    sum_of_all = total(a)
    half = tl.maximum(sum_of_all, SMALL) * 0.5
    free = ()
    unsaturated = ()
    for i in tl.static_range(4):
        free = free + (below(a[i], half),)
        unsaturated = unsaturated + (a[i] * free[i],)
    sums = running_sums(unsaturated)
    share = tl.fma(total(free), -0.5, 2.5)  # 1 / R, R = 2 - (4 - free)
    kept = kept_elements(free, sums, share, u)
    step = sums[3] * share
    pair = ((1 << (kept & 31)) & PAIRS) != 0
    usual = (sum_of_all >= SMALL) & (sum_of_all < float("inf")) & (u >= UNUSUAL_BELOW) & pair
    return x, kept, half, rounded(step, DTYPE), ~(usual | (sums[3] == 0.0))


@triton.jit
def kept_elements(free, sums, share, u):
    """Return bit i for each element i that is saturated, or in which the running sum passes a threshold."""
    t0 = u * sums[3] * share
    t1 = (u + tl.fma(total(free), -8.0, 33.0)) * sums[3] * share  # u + 1; past the end where R < 2
    passed = ()
    for i in tl.static_range(4):
        passed = passed + (below(t0, sums[i]) + below(t1, sums[i]),)
    # The sum over i of 2**i (1 - free_i + passed_i - passed_{i-1}):
    kept = tl.fma(passed[3] - free[3], 8.0, INTEGERS + 15.0)
    kept = tl.fma(passed[2] + free[2], -4.0, kept)
    kept = tl.fma(passed[1] + free[1], -2.0, kept)
    return (kept - (passed[0] + free[0])).to(tl.int32, bitcast=True)


@triton.jit
def below(a, b):
    """Return 1.0 where a < b, 0.0 elsewhere."""
    return (a < b).to(tl.float32)


@triton.jit
def pruned_block(x, kept, half, step, DTYPE: tl.constexpr):
    """Return the pruned blocks."""
    pruned = ()
    for i in tl.static_range(4):
        value = tl.where((kept & (1 << i)) != 0, emitted(x[i], half, step), 0.0)
        pruned = pruned + (exact_bits(value, DTYPE),)
    return pruned


@triton.jit
def packed_block(x, kept, half, step, DTYPE: tl.constexpr):
    """Return the pruned blocks in the form of `packing.pack_pairs`."""
    pair, code = pack_kept(kept, x)
    low = emitted(pair[0] + 0.0, half, step)  # a -0 that fills up a pair becomes 0
    high = emitted(pair[1] + 0.0, half, step)
    return (exact_bits(low, DTYPE), exact_bits(high, DTYPE)), code


@triton.jit
def emitted(x, half, step):
    """Return a kept element: unchanged if saturated, else the step with its sign."""
    signed = (x.to(tl.int32, bitcast=True) & SIGN) | step.to(tl.int32, bitcast=True)
    return tl.where(tl.abs(x) < half, signed.to(tl.float32, bitcast=True), x)
