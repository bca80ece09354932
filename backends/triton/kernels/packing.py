"""The packed form of 2:4 blocks (`nmcompile.pruning.packed`) for blocks as tuples of four tensors."""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import magnitude

# Four bits, indexed by a 3-bit number whose bits say whether elements 1, 2 and 3 are kept: the place of the first of
# the pair, and above it the place of the second. Element 0 needs no bit: it is kept if fewer than two others are, as
# it is the lowest zero.
CODES = tl.constexpr(0x0EDC9844)


@triton.jit
def pack_pairs(pruned, DTYPE: tl.constexpr):
    """Return the two values of every block in index order, and their positions in bits 0-1 and 2-3."""
    nonzero = ()
    for i in tl.static_range(4):
        nonzero = nonzero + (magnitude(pruned[i], DTYPE) != 0,)
    return pack_kept(as_bits(nonzero), pruned)


@triton.jit
def as_bits(flags):
    """Return an int32 in which bit i is set if flag i holds."""
    bits = flags[0].to(tl.int32)
    for i in tl.static_range(1, len(flags)):
        bits |= flags[i].to(tl.int32) << i
    return bits


@triton.jit
def pack_kept(kept, values):
    """Pack as `pack_pairs` the elements whose bit is set in `kept`, two at most, filled up with the first others.

    Bits of `kept` from the fifth on are ignored.
    """
    code = (CODES >> ((kept & 14) << 1)) & 15
    low = tl.where((code & 2) != 0, values[2], tl.where((code & 1) != 0, values[1], values[0]))
    high = tl.where((kept & 8) != 0, values[3], tl.where((kept & 4) != 0, values[2], values[1]))
    return (low, high), code
