"""The uniform numbers of `nmcompile.pruning.philox`: four to a counter, each computed only once if possible."""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import join_blocks
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
def uniforms_of_walks(
    row_numbers,
    first_column,
    column_weight,
    key,
    ALIGNED: tl.constexpr,
    DRAWS: tl.constexpr,
    WALK: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Return the numbers of walks over WALK consecutive blocks: for each step DRAWS tensors `(R * C,)`.

    Walk (r, c) starts at the block row_numbers[r] + (first_column + c) * column_weight. The walks of a thread are SIDE
    consecutive columns: their words are computed apart and then joined, which moves nothing between threads.

    Args:
        row_numbers: int64 `(R, 1)`.
        ALIGNED: whether every walk starts with the first number of a counter.
    """
    B: tl.constexpr = row_numbers.shape[0] * C // SIDE
    words_of = ()
    for i in tl.static_range(SIDE):
        column = first_column + i + SIDE * tl.arange(0, C // SIDE)[None, :]
        start = tl.reshape(row_numbers + column * column_weight, (B,))
        words_of = words_of + (consecutive_words(start * DRAWS, key, ALIGNED),)
    steps = ()
    for step in tl.static_range(WALK):
        draws = ()
        for draw in tl.static_range(DRAWS):
            u = ()
            for i in tl.static_range(SIDE):
                u = u + (to_uniform(words_of[i][step * DRAWS + draw]),)
            draws = draws + (u[0] if SIDE == 1 else tl.reshape(join_blocks(u, SIDE), (B * SIDE,)),)
        steps = steps + (draws,)
    return steps


@triton.jit
def at_step(steps, step):
    """Return the numbers of one step of the walks."""
    u = steps[0]
    for i in tl.static_range(1, len(steps)):
        later = ()
        for draw in tl.static_range(len(u)):
            later = later + (tl.where(step == i, steps[i][draw], u[draw]),)
        u = later
    return u


@triton.jit
def consecutive_words(first, key, ALIGNED: tl.constexpr):
    """Return the words `first`, ..., `first` + 3, int64; where ALIGNED, they are those of one counter."""
    low = words(first >> 2, key)
    if ALIGNED:
        result = low
    else:
        by_one = shifted(low + words((first >> 2) + 1, key), (first & 1) != 0, 1)
        result = shifted(by_one, (first & 2) != 0, 2)
    return result


@triton.jit
def shifted(words, further, BY: tl.constexpr):
    """Return the words from the first one, or where `further` holds from the one that is BY further."""
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
