"""The packed form of 2:4 blocks (`nmcompile.pruning.packed`) for blocks as tuples of four tensors."""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import magnitude


@triton.jit
def pack_pairs(pruned, DTYPE: tl.constexpr):
    """The two values of every block in index order, and their positions: the first in bits 0-1, the second in 2-3."""
    k0, k1, k2, k3 = occupied(pruned, DTYPE)
    first = tl.where(k0, 0, tl.where(k1, 1, 2))
    second = tl.where(k3, 3, tl.where(k2, 2, 1))
    low = tl.where(k0, pruned[0], tl.where(k1, pruned[1], pruned[2]))
    high = tl.where(k3, pruned[3], tl.where(k2, pruned[2], pruned[1]))
    return (low, high), first | (second << 2)


@triton.jit
def occupied(pruned, DTYPE: tl.constexpr):
    """The non-zeros, and the lowest zeros until there are two."""
    nonzero = ()
    missing = tl.full(pruned[0].shape, 2, tl.int32)
    for i in tl.static_range(4):
        nonzero = nonzero + (magnitude(pruned[i], DTYPE) != 0,)
        missing -= nonzero[i].to(tl.int32)
    filled = ()
    for i in tl.static_range(4):
        added = ~nonzero[i] & (missing > 0)
        filled = filled + (nonzero[i] | added,)
        missing -= added.to(tl.int32)
    return filled
