"""The uniform numbers of `nmcompile.pruning.philox`: four to a counter, each computed only once if possible."""

import triton
import triton.language as tl

from nmcompile.pruning import philox

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0 = tl.constexpr(philox.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIERS[1])
WEYL_0 = tl.constexpr(philox.WEYL[0])
WEYL_1 = tl.constexpr(philox.WEYL[1])


@triton.jit
def uniforms(counters, key, DRAWS: tl.constexpr):
    """Return the numbers of `counters`, int64 `(Q,)` or `(R, Q)`: DRAWS tensors whose last dim is 4 Q / DRAWS long."""
    w0, w1, w2, w3 = words(counters, key)
    if DRAWS == 1:
        u = (to_uniform(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))),)
    else:
        u = (to_uniform(tl.interleave(w0, w2)), to_uniform(tl.interleave(w1, w3)))
    return u


@triton.jit
def uniforms_one_by_one(blocks, key, DRAWS: tl.constexpr):
    """Return the numbers of any `blocks`, int64, with a counter for each: a tuple of DRAWS tensors of their shape."""
    number = blocks * DRAWS
    w0, w1, w2, w3 = words(number >> 2, key)
    word = number & 3
    if DRAWS == 1:
        u = (to_uniform(tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))),)
    else:
        u = (to_uniform(tl.where(word == 0, w0, w2)), to_uniform(tl.where(word == 0, w1, w3)))
    return u


@triton.jit
def consecutive_words(first, key, ALIGNED: tl.constexpr):
    """The random words `first`, ..., `first` + 3 of a key, int64; ALIGNED tells that `first` is a multiple of four."""
    low = words(first >> 2, key)
    if ALIGNED:
        result = low
    else:
        by_one = shifted(low + words((first >> 2) + 1, key), (first & 1) != 0, 1)
        result = shifted(by_one, (first & 2) != 0, 2)
    return result


@triton.jit
def shifted(words, further, BY: tl.constexpr):
    """The words from the first on, or where `further` holds from the one BY after it."""
    result = ()
    for i in tl.static_range(len(words) - BY):
        result = result + (tl.where(further, words[i + BY], words[i]),)
    return result


@triton.jit
def to_uniform(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24; exact


@triton.jit
def words(counters, key):
    """Compute Philox4x32-10 of 64-bit counters and a 64-bit key, both int64: four uint32 tensors."""
    c0 = counters.to(tl.uint32)
    c1 = (counters >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = c2
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        product_0 = c0.to(tl.uint64) * MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = k0 + tl.full((), WEYL_0, tl.uint32)
        k1 = k1 + tl.full((), WEYL_1, tl.uint32)
    return c0, c1, c2, c3
