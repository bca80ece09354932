// Common parts of the random operators: numbers for each block, arithmetic in reals, and the scalar code as a fallback.
#pragma once

#include <cstdint>

#include "prune/draws.h"
#include "prune/rows.h"
#include "prune/scalar_blocks.h"

namespace nmcompile::NMCOMPILE_ISA {

// `Core` prunes vectors of reals and returns the lanes that are left to its scalar form. A unit has `Blocks` blocks.
template <class T, class Core, int Blocks>
class DrawnRows {
   public:
    DrawnRows(const Run& run, const Rule& rule) : draws_(run, rule.key) {}

    NMCOMPILE_INLINE void start(std::int64_t lane) {
        for (int p = 0; p < kParts<T>; ++p) draws_.get(lane + p * kNumbers, u_[p]);
    }

    // Prunes block b of the units that `start` names, from rows x to rows y.
    template <class NKeep, class Block>
    NMCOMPILE_INLINE void prune(const Row<T>* x, Row<T>* y, int b, NKeep n_keep, Block block) const {
        Reals<T> in[kParts<T>][kMaxBlock], out[kParts<T>][kMaxBlock];
        for (int i = 0; i < block; ++i) {
            Reals<T> row[kParts<T>];
            Convert<T>::widen(x[i], row);
            for (int p = 0; p < kParts<T>; ++p) in[p][i] = row[p];
        }
        std::uint64_t left = 0;
        for (int p = 0; p < kParts<T>; ++p) {
            Reals<T> u[Core::kDraws];
            for (int d = 0; d < Core::kDraws; ++d) u[d] = real(u_[p][b * Core::kDraws + d]);
            const auto mask = Core::template prune<Reals<T>>(in[p], out[p], u, n_keep, block);
            if (any(mask)) left |= lane_bits(mask) << (p * kLanesOf<Reals<T>>);
        }
        for (int i = 0; i < block; ++i) {
            Reals<T> row[kParts<T>];
            for (int p = 0; p < kParts<T>; ++p) row[p] = out[p][i];
            y[i] = Convert<T>::narrow(row);
        }
        if (left == 0) [[likely]] return;
        Row<T> from[kMaxBlock], to[kMaxBlock];  // copies, so x and y need not be in memory
        for (int i = 0; i < block; ++i) {
            from[i] = x[i];
            to[i] = y[i];
        }
        prune_scalar(from, to, b, n_keep, block, left);
        for (int i = 0; i < block; ++i) y[i] = to[i];
    }

   private:
    static Reals<T> real(Floats u) {
        if constexpr (sizeof(typename Arithmetic<T>::Real) == sizeof(float)) {
            return u;
        } else {
            return __builtin_convertvector(half<0>(u), Reals<T>);
        }
    }

    [[gnu::noinline, gnu::cold]] void prune_scalar(const Row<T>* x, Row<T>* y, int b, int n_keep, int block,
                                                   std::uint64_t lanes) const {
        constexpr int kCount = kLanesOf<Row<T>>;
        T in[kMaxBlock][kCount], out[kMaxBlock][kCount];
        for (int i = 0; i < block; ++i) {
            store(x[i], in[i]);
            store(y[i], out[i]);
        }
        for (; lanes != 0; lanes &= lanes - 1) {
            const int l = __builtin_ctzll(lanes);
            float u[Core::kDraws];
            for (int d = 0; d < Core::kDraws; ++d) u[d] = u_[l / kNumbers][b * Core::kDraws + d][l % kNumbers];
            Core::template prune_scalar<T>({&in[0][l], kCount, &out[0][l], kCount, block, n_keep, u});
        }
        for (int i = 0; i < block; ++i) y[i] = load<Row<T>>(out[i]);
    }

    UnitDraws<Blocks, Core::kDraws> draws_;
    Floats u_[kParts<T>][Blocks * Core::kDraws];
};

template <class V>
NMCOMPILE_INLINE V absolute(V x) {
    using Ints = IntsOf<V>;
    constexpr auto kMagnitude = static_cast<LaneOf<Ints>>(~(LaneOf<Ints>{1} << (8 * sizeof(LaneOf<V>) - 1)));
    return __builtin_bit_cast(V, bits(x) & kMagnitude);
}

// Returns `magnitude`, which is not negative, with the sign of x.
template <class V>
NMCOMPILE_INLINE V copy_sign(V magnitude, V x) {
    using Ints = IntsOf<V>;
    constexpr auto kSign = static_cast<LaneOf<Ints>>(LaneOf<Ints>{1} << (8 * sizeof(LaneOf<V>) - 1));
    return __builtin_bit_cast(V, bits(magnitude) | (bits(x) & kSign));
}

template <class V>
inline constexpr LaneOf<V> kLargest =
    static_cast<LaneOf<V>>(sizeof(LaneOf<V>) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023);
template <class V>
inline constexpr LaneOf<V> kSmallest = static_cast<LaneOf<V>>(sizeof(LaneOf<V>) == 4 ? 0x1p-149 : 0x1p-1074);
template <class V>
inline constexpr LaneOf<V> kInfinity = __builtin_huge_val();

}  // namespace nmcompile::NMCOMPILE_ISA
