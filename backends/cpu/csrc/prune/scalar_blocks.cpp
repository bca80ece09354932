#include "prune/scalar_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace nmcompile {
namespace {

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

// Returns the element nearest to `position` that is neither zero nor kept, the lower one of two.
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

// Returns the position of an element drawn with a probability in proportion to `a`, -1 if none is free.
template <class Real>
int draw_one(const Real* a, const bool* kept, int block, Real u) {
    Real total = 0;
    for (int i = 0; i < block; ++i) total += kept[i] ? Real{0} : a[i];
    const Real threshold = u * total;
    Real sum = 0;
    int position = 0;
    for (; position < block; ++position) {
        sum += kept[position] ? Real{0} : a[position];
        if (sum > threshold) break;
    }
    return nearest_free(a, kept, block, position);
}

// Returns a_i / p_i of Equation (25) of Chmiel et al. 2023, at least a_i; all sums in index order.
template <class Real>
Real inverse_probability(const Real* a, int block, int i) {
    Real all = 0, terms = 0;
    for (int k = 0; k < block; ++k) {
        all += a[k];
        if (k == i) continue;
        Real others = 0;
        for (int l = 0; l < block; ++l) others += l == k ? Real{0} : a[l];
        terms += a[k] / others;
    }
    return std::max(all / (1 + terms), a[i]);
}

template <class T>
void write(const ScalarBlock<T>& block, const bool* kept, const bool* unchanged,
           const typename Arithmetic<T>::Real* magnitudes) {
    for (int i = 0; i < block.block; ++i) {
        const T x = block.in[i * block.in_stride];
        T& y = block.out[i * block.out_stride];
        if (!kept[i]) {
            y = T{};
        } else {
            y = unchanged[i] ? x : narrow<T>(std::copysign(magnitudes[i], widen(x)));
        }
    }
}

}  // namespace

template <class T>
void scalar_mvue(const ScalarBlock<T>& block) {
    using Real = typename Arithmetic<T>::Real;
    Real a[kMaxBlock] = {}, magnitudes[kMaxBlock];
    for (int i = 0; i < block.block; ++i) a[i] = std::fabs(widen(block.in[i * block.in_stride]));
    const Drawn<Real> drawn = draw(a, block.block, block.n_keep, static_cast<Real>(block.u[0]));
    std::fill_n(magnitudes, block.block, drawn.step);
    write(block, drawn.kept, drawn.saturated, magnitudes);
}

template <class T>
void scalar_mvue_approx(const ScalarBlock<T>& block) {
    using Real = typename Arithmetic<T>::Real;
    constexpr int kDraws = 2;
    Real a[kMaxBlock] = {}, total = 0, magnitudes[kMaxBlock] = {};
    bool kept[kMaxBlock] = {}, unchanged[kMaxBlock];
    int nonzeros = 0;
    for (int i = 0; i < block.block; ++i) {
        a[i] = std::fabs(widen(block.in[i * block.in_stride]));
        total += a[i];
        nonzeros += a[i] > 0;
    }
    const bool finite = std::isfinite(total);
    std::fill_n(unchanged, block.block, !finite || nonzeros <= kDraws);
    if (!finite) {
        keep_largest(a, block.block, kDraws, kept);
    } else {
        for (int j = 0; j < kDraws; ++j) {
            const int position = draw_one(a, kept, block.block, static_cast<Real>(block.u[j]));
            if (position >= 0) kept[position] = true;
        }
        for (int i = 0; i < block.block; ++i) {
            if (kept[i] && !unchanged[i]) magnitudes[i] = inverse_probability(a, block.block, i);
        }
    }
    write(block, kept, unchanged, magnitudes);
}

template void scalar_mvue(const ScalarBlock<double>&);
template void scalar_mvue(const ScalarBlock<float>&);
template void scalar_mvue(const ScalarBlock<Half>&);
template void scalar_mvue(const ScalarBlock<BFloat16>&);
template void scalar_mvue_approx(const ScalarBlock<double>&);
template void scalar_mvue_approx(const ScalarBlock<float>&);
template void scalar_mvue_approx(const ScalarBlock<Half>&);
template void scalar_mvue_approx(const ScalarBlock<BFloat16>&);

}  // namespace nmcompile
