// MVUE of one block, step by step as nmcompile/pruning/mvue.py defines it. The fast path in mvue_strip.h leaves the
// blocks to it that are not finite or where rounding moves a threshold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>

#include "storage.h"

namespace nmcompile {

constexpr int kMaxBlock = 32;

// Keeps N elements: NaN and infinity first, then by descending |a|, then by index.
template <class Real>
void keep_largest(const Real* a, int block, int n_keep, bool* kept) {
    const auto score = [&](int i) { return std::isfinite(a[i]) ? a[i] : std::numeric_limits<Real>::infinity(); };
    for (int i = 0; i < block; ++i) {
        int rank = 0;
        for (int other = 0; other < block; ++other) {
            rank += other < i ? score(other) >= score(i) : score(other) > score(i);
        }
        kept[i] = rank < n_keep;
    }
}

// The element nearest to `position` that is neither zero nor kept, the lower one of two.
template <class Real>
int nearest_free(const Real* a, const bool* kept, int block, int position) {
    int best = -1;
    for (int i = 0; i < block; ++i) {
        const bool free = a[i] > 0 && !kept[i];
        if (free && (best < 0 || std::abs(i - position) < std::abs(best - position))) best = i;
    }
    return best;
}

template <class Real>
struct Drawn {
    bool kept[kMaxBlock];
    bool saturated[kMaxBlock];  // kept with p = 1: emitted unchanged
    Real step;                  // |value| of the other kept elements
};

template <class Real>
Drawn<Real> draw(const Real* a, int block, int n_keep, Real u) {
    Drawn<Real> drawn{};
    Real total = 0;
    int nonzeros = 0;
    for (int i = 0; i < block; ++i) {
        total += a[i];
        nonzeros += a[i] > 0;
    }
    if (!std::isfinite(total) || nonzeros <= n_keep) {
        if (!std::isfinite(total)) {
            keep_largest(a, block, n_keep, drawn.kept);
        } else {
            for (int i = 0; i < block; ++i) drawn.kept[i] = a[i] > 0;
        }
        std::copy_n(drawn.kept, block, drawn.saturated);
        return drawn;
    }
    Real rest = total;
    int remaining = n_keep;
    for (int joined = 1; joined > 0 && remaining > 0;) {
        rest = 0;
        for (int i = 0; i < block; ++i) {
            if (!drawn.saturated[i]) rest += a[i];
        }
        joined = 0;
        for (int i = 0; i < block; ++i) {
            if (drawn.saturated[i] || !(a[i] > 0) || !(a[i] * static_cast<Real>(remaining) >= rest)) continue;
            drawn.saturated[i] = drawn.kept[i] = true;
            ++joined;
        }
        remaining -= joined;
    }
    for (int j = 0; j < remaining; ++j) {
        const Real threshold = (u + static_cast<Real>(j)) * rest / static_cast<Real>(remaining);
        Real sum = 0;
        int position = 0;
        for (; position < block; ++position) {
            if (!drawn.saturated[position]) sum += a[position];
            if (sum > threshold) break;
        }
        drawn.kept[nearest_free(a, drawn.kept, block, position)] = true;
    }
    drawn.step = rest / static_cast<Real>(remaining);
    return drawn;
}

// Prunes one block in memory; strides in elements.
template <class T>
void prune_block(const T* in, std::ptrdiff_t in_stride, T* out, std::ptrdiff_t out_stride, int block, int n_keep,
                 typename Arithmetic<T>::Real u) {
    using Real = typename Arithmetic<T>::Real;
    if (block < 1) __builtin_unreachable();
    Real a[kMaxBlock];
    for (int i = 0; i < block; ++i) a[i] = std::fabs(widen(in[i * in_stride]));
    const Drawn<Real> drawn = draw(a, block, n_keep, u);
    for (int i = 0; i < block; ++i) {
        const T x = in[i * in_stride];
        T& y = out[i * out_stride];
        if (!drawn.kept[i]) {
            y = T{};
        } else {
            y = drawn.saturated[i] ? x : narrow<T>(std::copysign(drawn.step, widen(x)));
        }
    }
}

}  // namespace nmcompile
