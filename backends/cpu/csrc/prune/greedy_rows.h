// The N largest of every M, as nmcompile/pruning/magnitude.py ranks them, one block per lane. Everything is arithmetic
// on the bits of the numbers, whose order is that of integers.
#pragma once

#include <cstdint>

#include "prune/block_run.h"
#include "prune/rows.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T>
inline constexpr std::int64_t kInfinityBits = 0;
template <>
inline constexpr std::int64_t kInfinityBits<double> = 0x7FF0000000000000;
template <>
inline constexpr std::int64_t kInfinityBits<float> = 0x7F800000;
template <>
inline constexpr std::int64_t kInfinityBits<Half> = 0x7C00;
template <>
inline constexpr std::int64_t kInfinityBits<BFloat16> = 0x7F80;

// Rows of ones that stay where an element is kept if `Masks`, else of the elements.
template <class T, bool ByValue, bool Relu, bool Masks>
class GreedyRows {
   public:
    GreedyRows(const Run&, const Rule&) {}

    void start(std::int64_t) {}

    template <class NKeep, class Block>
    NMCOMPILE_INLINE void prune(const Row<T>* x, Row<T>* y, int, NKeep n_keep, Block block) const {
        Row<T> scores[kMaxBlock];
        for (int i = 0; i < block; ++i) {
            const Row<T> value = Relu ? relu(x[i]) : x[i];
            scores[i] = score(value);
            y[i] = Masks ? Row<T>{} + Int{1} : value;
        }
        if constexpr (!std::is_same_v<Block, int>) {
            keep_half(scores, y, n_keep, block);
        } else {
            keep_any(scores, y, n_keep, block);
        }
    }

   private:
    using Int = Bits<T>;
    static constexpr int kBits = 8 * sizeof(T);
    static constexpr Int kInfinite = static_cast<Int>(kInfinityBits<T>);
    static constexpr Int kLowest = static_cast<Int>(std::uint64_t{1} << (kBits - 1));  // -0

    static NMCOMPILE_INLINE Row<T> smaller(Row<T> a, Row<T> b) { return a < b ? a : b; }

    // Computes max(x, 0), which leaves NaN and -0 unchanged.
    static NMCOMPILE_INLINE Row<T> relu(Row<T> x) {
        if constexpr (sizeof(T) >= 4) {
            return __builtin_bit_cast(Row<T>, larger(Reals<T>{}, __builtin_bit_cast(Reals<T>, x)));
        } else {
            const Row<T> lowest = Row<T>{} + kLowest;
            const auto negative = greater(x, lowest) & at_least(lowest + kInfinite, x);
            return keep(~negative, x);
        }
    }

    // Returns a score that orders like the reference's; non-finite numbers count as infinity.
    static NMCOMPILE_INLINE Row<T> score(Row<T> x) {
        const Row<T> infinite = Row<T>{} + kInfinite;
        const Row<T> magnitude = smaller(x & static_cast<Int>(~kLowest), infinite);
        if constexpr (!ByValue) return magnitude;
        const Row<T> negated = x < Row<T>{} ? -magnitude : magnitude;
        return magnitude == infinite ? infinite : negated;
    }

    // 1:2, 2:4 and 4:8. The ranks of a block are the digits of one number, four bits each: an element starts after all
    // later ones, and each comparison moves one of two elements. Elements of a rank below N = M / 2 lack the bit N.
    template <int N, int M>
    static NMCOMPILE_INLINE void keep_half(const Row<T>* scores, Row<T>* y, Constant<N>, Constant<M>) {
        static_assert(M == 2 * N && M <= 8);
        constexpr int kDigits = kBits / 4 < M ? kBits / 4 : M;
        constexpr int kNumbers = M / kDigits;
        const auto digit = [](int i, int value) {
            return static_cast<Int>(static_cast<std::uint64_t>(value) << (i % kDigits * 4));
        };
        Row<T> ranks[kNumbers] = {};
        for (int i = 0; i < M; ++i) ranks[i / kDigits] += digit(i, M - 1 - i);
        for (int i = 0; i < M; ++i) {
            for (int j = i + 1; j < M; ++j) {
                const auto ahead = at_least(scores[i], scores[j]);
                Row<T>& of_i = ranks[i / kDigits];
                Row<T>& of_j = ranks[j / kDigits];
                if (i / kDigits == j / kDigits) {
                    of_i = select(ahead, of_i + static_cast<Int>(digit(j, 1) - digit(i, 1)), of_i);
                } else {
                    of_i = select(ahead, of_i - digit(i, 1), of_i);
                    of_j = select(ahead, of_j + digit(j, 1), of_j);
                }
            }
        }
        for (int i = 0; i < M; ++i) y[i] = keep(equal(ranks[i / kDigits] & digit(i, N), Row<T>{}), y[i]);
    }

    static NMCOMPILE_INLINE void keep_any(const Row<T>* scores, Row<T>* y, int n_keep, int block) {
        const Row<T> one = Row<T>{} + Int{1}, limit = Row<T>{} + static_cast<Int>(n_keep);
        for (int i = 0; i < block; ++i) {
            Row<T> rank = {};
            for (int j = 0; j < i; ++j) rank += keep(at_least(scores[j], scores[i]), one);
            for (int j = i + 1; j < block; ++j) rank += keep(greater(scores[j], scores[i]), one);
            y[i] = keep(greater(limit, rank), y[i]);
        }
    }
};

}  // namespace nmcompile::NMCOMPILE_ISA
