"""Elements as the integers that memory holds, and blocks as tuples of their elements.

Kernels read and write tensors through `int16` and `int32` views: an element that is kept unchanged keeps its bits, and
ranks need no floats. The bfloat16 conversions are spelled out because Triton's interpreter truncates.
"""

import triton
import triton.language as tl


@triton.jit
def sign_bit(DTYPE: tl.constexpr):
    return -0x80000000 if DTYPE == tl.float32 else -0x8000


@triton.jit
def infinity(DTYPE: tl.constexpr):
    """Return the bits of +inf; those of a NaN's magnitude are larger."""
    return 0x7F800000 if DTYPE == tl.float32 else (0x7F80 if DTYPE == tl.bfloat16 else 0x7C00)


@triton.jit
def magnitude(bits, DTYPE: tl.constexpr):
    """Return the bits without the sign, int32; they order as the magnitudes do."""
    return bits.to(tl.int32) & (0x7FFFFFFF if DTYPE == tl.float32 else 0x7FFF)


@triton.jit
def to_float(bits, DTYPE: tl.constexpr):
    """Return the number as float32."""
    if DTYPE == tl.float32:
        number = bits.to(tl.float32, bitcast=True)
    elif DTYPE == tl.bfloat16:
        number = (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def to_bits(number, DTYPE: tl.constexpr):
    """Round a float32 that is not a NaN to the nearest, ties to even."""
    if DTYPE == tl.float32:
        bits = number.to(tl.int32, bitcast=True)
    elif DTYPE == tl.bfloat16:
        wide = number.to(tl.uint32, bitcast=True)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int16)
    else:
        bits = number.to(tl.float16).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def rounded(number, DTYPE: tl.constexpr):
    """Return the float32 that `to_bits` stores."""
    return number if DTYPE == tl.float32 else to_float(to_bits(number, DTYPE), DTYPE)


@triton.jit
def exact_bits(number, DTYPE: tl.constexpr):
    """Return `to_bits` of a float32 that DTYPE holds exactly."""
    return (number.to(tl.uint32, bitcast=True) >> 16).to(tl.int16) if DTYPE == tl.bfloat16 else to_bits(number, DTYPE)


@triton.jit
def with_sign(bits, signed, DTYPE: tl.constexpr):
    """Return non-negative `bits` with the sign of `signed`."""
    return bits | (signed & sign_bit(DTYPE)).to(bits.dtype)


@triton.jit
def split_blocks(tile, M: tl.constexpr):
    """Return the M elements of blocks `(B, M)`, each `(B,)`; M is 2, 4 or 8."""
    B: tl.constexpr = tile.shape[0]
    if M == 2:
        elements = tl.split(tile)
    elif M == 4:
        even, odd = tl.split(tl.reshape(tile, (B, 2, 2)))
        e0, e2 = tl.split(even)
        e1, e3 = tl.split(odd)
        elements = (e0, e1, e2, e3)
    else:
        even, odd = tl.split(tl.reshape(tile, (B, 4, 2)))
        e0, e2, e4, e6 = split_blocks(even, 4)
        e1, e3, e5, e7 = split_blocks(odd, 4)
        elements = (e0, e1, e2, e3, e4, e5, e6, e7)
    return elements


@triton.jit
def join_blocks(elements, M: tl.constexpr):
    """Invert `split_blocks`."""
    B: tl.constexpr = elements[0].shape[0]
    if M == 2:
        tile = tl.join(elements[0], elements[1])
    elif M == 4:
        tile = tl.join(tl.join(elements[0], elements[2]), tl.join(elements[1], elements[3]))
    else:
        even = join_blocks((elements[0], elements[2], elements[4], elements[6]), 4)
        odd = join_blocks((elements[1], elements[3], elements[5], elements[7]), 4)
        tile = tl.join(even, odd)
    return tl.reshape(tile, (B, M))
