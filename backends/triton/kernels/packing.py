"""The packed form of 2:4 blocks: two values and four bits of positions, for blocks as tuples of four tensors."""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.operators import zero_where_pruned


@triton.jit
def pack_pairs(kept, values):
    """The two values of every block in index order, and their positions: the first in bits 0-1, the second in 2-3."""
    pruned = zero_where_pruned(kept, values)
    k0, k1, k2, k3 = fill_up(kept)
    first = tl.where(k0, 0, tl.where(k1, 1, 2))
    second = tl.where(k3, 3, tl.where(k2, 2, 1))
    low = tl.where(k0, pruned[0], tl.where(k1, pruned[1], pruned[2]))
    high = tl.where(k3, pruned[3], tl.where(k2, pruned[2], pruned[1]))
    return (low, high), first | (second << 2)


@triton.jit
def fill_up(kept):
    """The kept elements, and the lowest of the others until there are two."""
    missing = tl.full(kept[0].shape, 2, tl.int32)
    for i in tl.static_range(4):
        missing -= kept[i].to(tl.int32)
    filled = ()
    for i in tl.static_range(4):
        added = ~kept[i] & (missing > 0)
        filled = filled + (kept[i] | added,)
        missing -= added.to(tl.int32)
    return filled
