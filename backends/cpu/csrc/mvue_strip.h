// MVUE of a strip of blocks, one block per SIMD lane, without branches on data. Vectors are those of GCC and Clang: they
// have the operators of their elements, and a comparison gives a mask of ones and zeros for `?:`.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "mvue_block.h"

namespace nmcompile {

constexpr int kLanes = 16;
constexpr int kVectorBytes = 16;  // what every x86-64 and every 64-bit ARM has

template <class Real>
using Rows = Real[kMaxBlock][kLanes];  // row i holds element i of every block

template <class Real>
struct Simd {
    using Int = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
    typedef Real Vector __attribute__((vector_size(kVectorBytes)));
    typedef Int Mask __attribute__((vector_size(kVectorBytes)));
    static constexpr int kWidth = kVectorBytes / sizeof(Real);
    static constexpr Int kSign = std::numeric_limits<Int>::min();

    static Vector absolute(Vector x) { return std::bit_cast<Vector>(std::bit_cast<Mask>(x) & ~kSign); }
    static Vector copy_sign(Vector magnitude, Vector sign) {
        return std::bit_cast<Vector>(std::bit_cast<Mask>(magnitude) | (std::bit_cast<Mask>(sign) & kSign));
    }
    static bool any(Mask mask) {
        Int result = 0;
        for (int l = 0; l < kWidth; ++l) result |= mask[l];
        return result != 0;
    }
    template <class Block>
    static Vector sum(const Vector* rows, Block block) {
        if (block < 1) __builtin_unreachable();
        Vector result = rows[0];
        for (int i = 1; i < block; ++i) result += rows[i];
        return result;
    }
};

// Prunes the blocks in `x` into `y`; the result says which lanes have to go to `prune_block` instead. `NKeep` and `Block`
// are int or integral constants, with which the compiler unrolls all loops.
template <class Real, class NKeep, class Block>
inline typename Simd<Real>::Mask prune_vector(const typename Simd<Real>::Vector* x, typename Simd<Real>::Vector* y,
                                              typename Simd<Real>::Vector u, NKeep n_keep, Block block) {
    using S = Simd<Real>;
    using Vector = typename S::Vector;
    using Mask = typename S::Mask;
    const Vector zero = {}, one = zero + 1;
    Vector open[kMaxBlock];        // |x|, zero where saturated
    Vector thresholds[kMaxBlock];  // t_j

    Vector nonzeros = zero;
    for (int i = 0; i < block; ++i) {
        open[i] = S::absolute(x[i]);
        nonzeros += open[i] > zero ? one : zero;
    }
    Vector rest = S::sum(open, block);
    Mask redo = ~(rest <= std::numeric_limits<Real>::max());
    const Mask many = nonzeros > static_cast<Real>(n_keep);  // the other lanes keep all that they have
    Vector remaining = many ? zero + static_cast<Real>(n_keep) : zero;
    for (int i = 0; i < block; ++i) open[i] = many ? open[i] : zero;

    for (int round = 0; round < n_keep; ++round) {
        rest = S::sum(open, block);
        Vector joined = zero;
        for (int i = 0; i < block; ++i) {
            const Mask joins = (open[i] > zero) & (open[i] * remaining >= rest);
            joined += joins ? one : zero;
            open[i] = joins ? zero : open[i];
        }
        remaining -= joined;
        if (!S::any(joined > zero)) break;
    }

    for (int j = 0; j < n_keep; ++j) {
        const Real number = static_cast<Real>(j);
        const Vector threshold = (u + number) * rest / remaining;
        thresholds[j] = number < remaining ? threshold : zero + std::numeric_limits<Real>::infinity();
    }
    // Element i is sampled if its running sum exceeds a threshold that the one before does not. Where two thresholds
    // meet in one element, or one is past the end, fewer than `remaining` are found.
    const Vector step = rest / remaining;
    Vector sum = zero, below = zero;
    for (int i = 0; i < block; ++i) {
        sum += open[i];
        Vector count = zero;
        for (int j = 0; j < n_keep; ++j) count += sum > thresholds[j] ? one : zero;
        const Mask sampled = count > below;
        const Mask saturated = (open[i] == zero) & (x[i] != zero);
        y[i] = sampled ? S::copy_sign(step, x[i]) : saturated ? x[i] : zero;
        remaining -= sampled ? one : zero;
        below = count;
    }
    return redo | (remaining != zero);
}

// Prunes a whole strip. Returns whether `redo` names a block.
template <class Real, class NKeep, class Block>
bool prune_strip(const Rows<Real>& x, Rows<Real>& y, const Real* u, bool* redo, NKeep n_keep, Block block) {
    using S = Simd<Real>;
    bool any = false;
    for (int first = 0; first < kLanes; first += S::kWidth) {
        typename S::Vector in[kMaxBlock], out[kMaxBlock], numbers;
        for (int i = 0; i < block; ++i) __builtin_memcpy(&in[i], &x[i][first], kVectorBytes);
        __builtin_memcpy(&numbers, u + first, kVectorBytes);
        const typename S::Mask lanes = prune_vector<Real>(in, out, numbers, n_keep, block);
        for (int i = 0; i < block; ++i) __builtin_memcpy(&y[i][first], &out[i], kVectorBytes);
        for (int l = 0; l < S::kWidth; ++l) {
            redo[first + l] = lanes[l] != 0;
            any |= redo[first + l];
        }
    }
    return any;
}

// As above, with unrolled loops for the common patterns.
template <class Real>
bool prune_strip(const Rows<Real>& x, Rows<Real>& y, const Real* u, bool* redo, int n_keep, int block) {
    const auto is = [&](int n, int m) { return n_keep == n && block == m; };
    const auto unrolled = [&]<int N, int M>() {
        return prune_strip(x, y, u, redo, std::integral_constant<int, N>{}, std::integral_constant<int, M>{});
    };
    if (is(1, 2)) return unrolled.template operator()<1, 2>();
    if (is(2, 4)) return unrolled.template operator()<2, 4>();
    if (is(4, 8)) return unrolled.template operator()<4, 8>();
    return prune_strip<Real, int, int>(x, y, u, redo, n_keep, block);
}

}  // namespace nmcompile
