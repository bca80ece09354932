"""`nmcompile.pruning.selection` for blocks as tuples of M tensors: the same comparisons, sums in the same order."""

import triton
import triton.language as tl

from nmcompile.backends.triton.kernels.storage import infinity, magnitude


@triton.jit
def scores(bits, DTYPE: tl.constexpr, BY_VALUE: tl.constexpr):
    """Return the rank scores of elements as integers: |a| or a, both zeros equal; NaN and infinities as +inf."""
    result = ()
    for i in tl.static_range(len(bits)):
        score = tl.minimum(magnitude(bits[i], DTYPE), infinity(DTYPE))
        if BY_VALUE:
            score = tl.where((bits[i] < 0) & (score < infinity(DTYPE)), -score, score)
        result = result + (score,)
    return result


@triton.jit
def largest(score, N: tl.constexpr):
    """Mark the N largest elements of every block; ties go to the lowest index."""
    M: tl.constexpr = len(score)
    kept = ()
    for i in tl.static_range(M):
        ahead = ()
        for j in tl.static_range(M):
            if j < i:
                ahead = ahead + (score[j] >= score[i],)
            elif j > i:
                ahead = ahead + (~(score[i] >= score[j]),)  # both directions use one comparison
        kept = kept + (~most_of_three(ahead) if N == 2 and M == 4 else count(ahead) < N,)
    return kept


@triton.jit
def most_of_three(flags):
    """Return whether at least two of three booleans hold: one instruction, while counting takes six."""
    return (flags[0] & flags[1]) | (flags[2] & (flags[0] | flags[1]))


@triton.jit
def total(a):
    """Return a_0 + a_1 + ..., added in index order."""
    result = a[0]
    for i in tl.static_range(1, len(a)):
        result += a[i]
    return result


@triton.jit
def total_without(a, left_out: tl.constexpr):
    """Return the total of all elements but one."""
    first: tl.constexpr = 1 if left_out == 0 else 0
    result = a[first]
    for i in tl.static_range(first + 1, len(a)):
        if i != left_out:
            result += a[i]
    return result


@triton.jit
def count(flags):
    """Return how many of the booleans hold, int32."""
    result = flags[0].to(tl.int32)
    for i in tl.static_range(1, len(flags)):
        result += flags[i].to(tl.int32)
    return result


@triton.jit
def zero_where(flags, a):
    """Return `a` with zeros where the flags hold."""
    result = ()
    for i in tl.static_range(len(a)):
        result = result + (tl.where(flags[i], 0.0, a[i]),)
    return result


@triton.jit
def running_sums(a):
    """Return s_i = a_0 + ... + a_i, added in index order."""
    sums = (a[0],)
    for i in tl.static_range(1, len(a)):
        sums = sums + (sums[i - 1] + a[i],)
    return sums


@triton.jit
def first_above(sums, threshold):
    """Return the index of the first running sum above the threshold, int32; M if there is none."""
    position = (sums[0] <= threshold).to(tl.int32)
    for i in tl.static_range(1, len(sums)):
        position += (sums[i] <= threshold).to(tl.int32)
    return position


@triton.jit
def nearest(allowed, position):
    """Mark the allowed element nearest to `position`, the lower one of two; none if no element is allowed."""
    M: tl.constexpr = len(allowed)
    best = tl.full(position.shape, 2 * M * M, tl.int32)
    for i in tl.static_range(M):
        best = tl.minimum(best, tl.where(allowed[i], tl.abs(position - i) * M + i, 2 * M * M))
    chosen = ()
    for i in tl.static_range(M):
        chosen = chosen + (allowed[i] & (tl.abs(position - i) * M + i == best),)
    return chosen
