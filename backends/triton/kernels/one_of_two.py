"""MVUE 1:2 in half of the operations that N:M takes (`operators.select_mvue`), with its results for any block.

In a pair with the sum S = |a| + |b|, the draw takes b if |a| <= u S, else a, and emits S with the sign of the element
that it takes. For two elements, water-filling and the rule for numbers that are not finite leave two exceptions:

- An element whose magnitude is the rounded sum is saturated: it is taken for any u, and S is its own magnitude. This
  includes the only element that is not zero. If S is subnormal, rounding of u S would lose it for some u.
- A pair without a finite sum keeps its larger element unchanged. A NaN ranks as an infinity, and of two equal elements
  the first is kept.
"""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import exact_bits, rounded, to_float

SIGN = tl.constexpr(-0x80000000)


@triton.jit
def prune_pair(bits, u, DTYPE: tl.constexpr):
    """Return the pruned blocks."""
    x0 = to_float(bits[0], DTYPE)
    x1 = to_float(bits[1], DTYPE)
    a = tl.abs(x0)
    b = tl.abs(x1)
    sum_of_both = a + b
    finite = sum_of_both < float("inf")
    drawn = (b >= sum_of_both) | ((a <= u * sum_of_both) & (a < sum_of_both))
    larger = (a < float("inf")) & ~(b <= a)
    second = (drawn & finite) | (larger & ~finite)
    taken = tl.where(second, x1, x0)
    signed = (taken.to(tl.int32, bitcast=True) & SIGN) | rounded(sum_of_both, DTYPE).to(tl.int32, bitcast=True)
    emitted = tl.where(finite, signed.to(tl.float32, bitcast=True) + 0.0, taken)  # -0 becomes 0
    kept = exact_bits(emitted, DTYPE)
    return tl.where(second, 0, kept).to(kept.dtype), tl.where(second, kept, 0).to(kept.dtype)
