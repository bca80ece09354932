"""The pruning operators on blocks: tuples of M integer tensors (see `storage`), each one element of every block.

Each returns the flags of the kept elements and the bits that they are emitted with. It performs the float32 operations
of `nmcompile.pruning` one by one: launch kernels without contraction, and divide by `tl.div_rn`.
"""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.one_of_two import prune_pair
from nmcompile.backends.triton.kernels.packing import as_bits, pack_kept, pack_pairs
from nmcompile.backends.triton.kernels.selection import (
    count,
    first_above,
    largest,
    nearest,
    running_sums,
    scores,
    total,
    total_without,
    zero_where,
)
from nmcompile.backends.triton.kernels.storage import to_bits, to_float, with_sign
from nmcompile.backends.triton.kernels.two_of_four import draw_pair, packed_block, pruned_block


@triton.jit
def prune(bits, u, OPERATOR: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the blocks pruned by the operator named OPERATOR with the uniform numbers `u` of the blocks."""
    if OPERATOR == "mvue" and N == 2 and len(bits) == 4:
        x, kept, half, step, unusual = draw_pair(bits, u[0], DTYPE)
        if tl.max(unusual.to(tl.int32), 0) != 0:
            pruned = prune_any(bits, u, OPERATOR, N, DTYPE)
        else:
            pruned = pruned_block(x, kept, half, step, DTYPE)
    elif OPERATOR == "mvue" and N == 1 and len(bits) == 2:
        pruned = prune_pair(bits, u[0], DTYPE)
    else:
        pruned = prune_any(bits, u, OPERATOR, N, DTYPE)
    return pruned


@triton.jit
def prune_and_pack(bits, u, OPERATOR: tl.constexpr, DTYPE: tl.constexpr):
    """Return the blocks pruned 2:4 in the form of `packing.pack_pairs`; `"keep"` is for blocks that are 2:4 already."""
    if OPERATOR == "keep":
        pairs, codes = pack_pairs(bits, DTYPE)
    elif OPERATOR == "mvue":
        x, kept, half, step, unusual = draw_pair(bits, u[0], DTYPE)
        if tl.max(unusual.to(tl.int32), 0) != 0:
            pairs, codes = pack_pairs(prune_any(bits, u, OPERATOR, 2, DTYPE), DTYPE)
        else:
            pairs, codes = packed_block(x, kept, half, step, DTYPE)
    elif OPERATOR == "greedy":  # it keeps the first zeros, as packing does
        kept, values = select(bits, u, OPERATOR, 2, DTYPE)
        pairs, codes = pack_kept(as_bits(kept), values)
    else:
        pairs, codes = pack_pairs(prune_any(bits, u, OPERATOR, 2, DTYPE), DTYPE)
    return pairs, codes


@triton.jit
def prune_any(bits, u, OPERATOR: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the same as `prune` for all kinds of blocks."""
    kept, values = select(bits, u, OPERATOR, N, DTYPE)
    return zero_where_pruned(kept, values)


@triton.jit
def select(bits, u, OPERATOR: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """Return mask and values of the elements that an operator keeps, with the uniform numbers `u` of the blocks."""
    if OPERATOR == "mvue":
        kept, values = select_mvue(bits, u[0], N, DTYPE)
    elif OPERATOR == "mvue_approx":
        kept, values = select_approx(bits, u, DTYPE)
    else:
        kept = largest(scores(bits, DTYPE, OPERATOR == "greedy_by_value"), N)
        values = bits
    return kept, values


@triton.jit
def select_mvue(bits, u, N: tl.constexpr, DTYPE: tl.constexpr):
    """Select as `nmcompile.pruning.minimum_variance`: water-filling, then systematic sampling."""
    M: tl.constexpr = len(bits)
    a = magnitudes(bits, DTYPE)
    saturated, remaining, rest = fill(a, N)
    sums = running_sums(zero_where(saturated, a))
    free = ()
    for i in tl.static_range(M):
        free = free + ((a[i] > 0) & ~saturated[i],)
    kept = saturated
    for j in tl.static_range(N):
        position = first_above(sums, quotient((u + j) * rest, remaining, N))
        chosen = nearest(free, position)
        now_kept = ()
        now_free = ()
        for i in tl.static_range(M):
            taken = chosen[i] & (remaining > j)
            now_kept = now_kept + (kept[i] | taken,)
            now_free = now_free + (free[i] & ~taken,)
        kept = now_kept
        free = now_free
    step = to_bits(quotient(rest, remaining, N), DTYPE)
    values = ()
    for i in tl.static_range(M):
        values = values + (tl.where(saturated[i], bits[i], with_sign(step, bits[i], DTYPE)),)
    return greedy_where_not_finite(bits, a, kept, values, N, DTYPE)


@triton.jit
def fill(a, N: tl.constexpr):
    """Return the saturated elements, how many remain to be drawn (float32), and the sum that they are drawn from."""
    M: tl.constexpr = len(a)
    nonzero = ()
    saturated = ()
    for i in tl.static_range(M):
        nonzero = nonzero + (a[i] > 0,)
        saturated = saturated + (a[i] < 0,)
    remaining = tl.full(a[0].shape, N, tl.float32)
    rest = remaining
    for _ in tl.static_range(N):
        rest = total(zero_where(saturated, a))
        joining = ()
        joined = ()
        for i in tl.static_range(M):
            new = ~saturated[i] & nonzero[i] & (a[i] * remaining >= rest)
            joining = joining + (new,)
            joined = joined + (saturated[i] | new,)
        saturated = joined
        remaining -= count(joining).to(tl.float32)
    few = count(nonzero) <= N
    result = ()
    for i in tl.static_range(M):
        result = result + (tl.where(few, nonzero[i], saturated[i]),)
    return result, tl.where(few, 0.0, remaining), rest


@triton.jit
def quotient(a, remaining, N: tl.constexpr):
    """Return a / remaining for remaining = 1, ..., N, rounded once; any number for 0, of which nothing is drawn."""
    if N <= 2:
        return a * tl.where(remaining == 2.0, 0.5, 1.0)  # as exact as the division, and much cheaper
    return tl.div_rn(a, tl.maximum(remaining, 1.0))


@triton.jit
def select_approx(bits, u, DTYPE: tl.constexpr):
    """Select as `nmcompile.pruning.mvue_approx`: two draws without replacement; emit a_i / p_i."""
    M: tl.constexpr = len(bits)
    a = magnitudes(bits, DTYPE)
    nonzero = ()
    for i in tl.static_range(M):
        nonzero = nonzero + (a[i] > 0,)
    first = draw(a, nonzero, u[0])
    others = ()
    for i in tl.static_range(M):
        others = others + (nonzero[i] & ~first[i],)
    second = draw(zero_where(first, a), others, u[1])
    few = count(nonzero) <= 2
    emitted = inverse_probability(a)
    kept = ()
    values = ()
    for i in tl.static_range(M):
        kept = kept + (first[i] | second[i],)
        drawn = with_sign(to_bits(emitted[i], DTYPE), bits[i], DTYPE)
        values = values + (tl.where(few, bits[i], drawn),)
    return greedy_where_not_finite(bits, a, kept, values, 2, DTYPE)


@triton.jit
def draw(a, allowed, u):
    """Draw one element with probability ∝ a."""
    sums = running_sums(a)
    return nearest(allowed, first_above(sums, u * sums[len(a) - 1]))


@triton.jit
def inverse_probability(a):
    """Return a_i / p_i = S / (1 + Σ_{k≠i} a_k / (S - a_k)), at least a_i."""
    M: tl.constexpr = len(a)
    odds = ()
    for k in tl.static_range(M):
        odds = odds + (tl.div_rn(a[k], total_without(a, k)),)
    emitted = ()
    for i in tl.static_range(M):
        value = tl.div_rn(total(a), 1.0 + total_without(odds, i))
        emitted = emitted + (tl.maximum(value, a[i]),)
    return emitted


@triton.jit
def magnitudes(bits, DTYPE: tl.constexpr):
    """Return |a|, float32."""
    a = ()
    for i in tl.static_range(len(bits)):
        a = a + (tl.abs(to_float(bits[i], DTYPE)),)
    return a


@triton.jit
def greedy_where_not_finite(bits, a, kept, values, N: tl.constexpr, DTYPE: tl.constexpr):
    """Keep the largest elements unchanged, NaN and infinities first, in blocks whose magnitudes have no finite sum."""
    finite = total(a) < float("inf")
    greedy = largest(scores(bits, DTYPE, False), N)
    all_kept = ()
    all_values = ()
    for i in tl.static_range(len(bits)):
        all_kept = all_kept + (tl.where(finite, kept[i], greedy[i]),)
        all_values = all_values + (tl.where(finite, values[i], bits[i]),)
    return all_kept, all_values


@triton.jit
def zero_where_pruned(kept, values):
    """Return the pruned blocks."""
    pruned = ()
    for i in tl.static_range(len(values)):
        pruned = pruned + (tl.where(kept[i], values[i], 0).to(values[i].dtype),)
    return pruned
