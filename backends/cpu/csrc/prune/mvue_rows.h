// The exact MVUE of nmcompile/pruning/minimum_variance.py, one block per lane, without branches on data.
#pragma once

#include "prune/drawn_rows.h"

namespace nmcompile::NMCOMPILE_ISA {

struct Mvue {
    static constexpr int kDraws = 1;

    template <class T>
    static void prune_scalar(const ScalarBlock<T>& block) {
        scalar_mvue(block);
    }

    template <class V, class NKeep, class Block>
    static NMCOMPILE_INLINE Mask<V> prune(const V* x, V* y, const V* u, NKeep n_keep, Block block) {
        if constexpr (std::is_same_v<Block, Constant<2>>) {
            return prune_one_of_two(x, y, u[0]);
        } else if constexpr (std::is_same_v<Block, Constant<4>> && std::is_same_v<NKeep, Constant<2>>) {
            return prune_two_of_four(x, y, u[0]);
        } else {
            return prune_any(x, y, u[0], n_keep, block);
        }
    }

   private:
    // One threshold, u (a + b), decides. A block with a zero, or with one element so small that the sum rounds to the
    // other, keeps the larger one, whose value equals the sum.
    template <class V>
    static NMCOMPILE_INLINE Mask<V> prune_one_of_two(const V* x, V* y, V u) {
        const V a = absolute(x[0]), b = absolute(x[1]), sum = a + b;
        const auto first = (greater(a, u * sum) | at_least(a, sum)).without(at_least(b, sum));
        const V value = copy_sign(sum, select(first, x[0], x[1])) + V{};  // adding 0 turns an empty block's -0 to 0
        y[0] = keep(first, value);
        y[1] = keep(~first, value);
        return ~at_least(V{} + kLargest<V>, sum);
    }

    // One round of water-filling suffices: in a second one an element joins only if it is the only non-zero left, which
    // is then drawn for certain and with its own magnitude, or if rounding hides others beside it (`absorbed`). R is 2
    // or 1, so a quotient by it is exact as a product, and a block with two non-zeros comes out unchanged without
    // counting them.
    template <class V>
    static NMCOMPILE_INLINE Mask<V> prune_two_of_four(const V* x, V* y, V u) {
        const V zero = {};
        V open[4];  // |x|, zero where saturated
        for (int i = 0; i < 4; ++i) open[i] = absolute(x[i]);
        const V total = open[0] + open[1] + open[2] + open[3];
        const V enough = larger(total, zero + kSmallest<V>);  // keeps zeros out
        Mask<V> stays[4];
        for (int i = 0; i < 4; ++i) {
            stays[i] = greater(enough, open[i] + open[i]);
            open[i] = keep(stays[i], open[i]);
        }
        V sums[4] = {open[0]};
        for (int i = 1; i < 4; ++i) sums[i] = sums[i - 1] + open[i];
        const V rest = sums[3];
        const auto some = greater(total, rest);  // some are saturated

        const V share = select(some, zero + 1, zero + LaneOf<V>(0.5));
        const V step = rest * share, low = u * rest * share, second = (u + 1) * rest * share;
        const V high = select(some, zero + kInfinity<V>, second);
        // Element i is drawn if its running sum exceeds a threshold that the previous sum does not.
        Mask<V> above_low = greater(sums[0], low), above_high = greater(sums[0], high);
        Mask<V> met = above_high;
        y[0] = select(above_low, copy_sign(step, x[0]), select(stays[0], zero, x[0]));
        for (int i = 1; i < 4; ++i) {
            const auto low_now = greater(sums[i], low), high_now = greater(sums[i], high);
            const auto drawn = low_now.without(above_low) | high_now.without(above_high);
            met = met | high_now.without(above_low);  // both thresholds are in one element
            y[i] = select(drawn, copy_sign(step, x[i]), select(stays[i], zero, x[i]));
            above_low = low_now;
            above_high = high_now;
        }
        const auto past = at_least(select(some, low, second), rest) & greater(rest, zero);  // a threshold is past the end
        const auto left = met | past | ~at_least(zero + kLargest<V>, total);

        const V largest = larger(larger(open[0], open[1]), larger(open[2], open[3]));
        const auto lopsided = some & (at_least(largest, rest) | at_least(total * LaneOf<V>(0x1p-20), rest));
        if (!any(lopsided)) return left;
        return left | (some & absorbed(x, stays, largest, rest));
    }

    // Returns the lanes where the largest open element equals the sum of all, but is not the only non-zero; or where
    // two elements are saturated, but are not the only non-zeros.
    template <class V>
    static NMCOMPILE_INLINE Mask<V> absorbed(const V* x, const Mask<V>* stays, V largest, V rest) {
        const auto two_of_four = [](auto m0, auto m1, auto m2, auto m3) {
            return (m0 & m1) | (m2 & m3) | ((m0 | m1) & (m2 | m3));
        };
        const V zero = {};
        const auto few = two_of_four(equal(x[0], zero), equal(x[1], zero), equal(x[2], zero), equal(x[3], zero));
        const auto two = two_of_four(~stays[0], ~stays[1], ~stays[2], ~stays[3]);
        return greater(rest, zero) & (two | at_least(largest, rest).without(few));
    }

    template <class V, class NKeep, class Block>
    static NMCOMPILE_INLINE Mask<V> prune_any(const V* x, V* y, V u, NKeep n_keep, Block block) {
        using Real = LaneOf<V>;
        const V zero = {}, one = zero + 1;
        V open[kMaxBlock];        // |x|, zero where saturated
        V thresholds[kMaxBlock];  // t_j
        if (block < 1) __builtin_unreachable();
        const auto total = [&] {
            V result = open[0];
            for (int i = 1; i < block; ++i) result += open[i];
            return result;
        };

        V nonzeros = zero;
        for (int i = 0; i < block; ++i) {
            open[i] = absolute(x[i]);
            nonzeros += keep(greater(open[i], zero), one);
        }
        V rest = total();
        const auto left = ~at_least(zero + kLargest<V>, rest);
        const auto many = greater(nonzeros, zero + static_cast<Real>(n_keep));  // other blocks keep all their elements
        V remaining = keep(many, zero + static_cast<Real>(n_keep));
        for (int i = 0; i < block; ++i) open[i] = keep(many, open[i]);

        for (int round = 0; round < n_keep; ++round) {
            rest = total();
            V joined = zero;
            for (int i = 0; i < block; ++i) {
                const auto joins = greater(open[i], zero) & at_least(open[i] * remaining, rest);
                joined += keep(joins, one);
                open[i] = keep(~joins, open[i]);
            }
            remaining -= joined;
            if (!any(greater(joined, zero))) break;
        }

        for (int j = 0; j < n_keep; ++j) {
            const V number = zero + static_cast<Real>(j);
            thresholds[j] = select(greater(remaining, number), (u + number) * rest / remaining, zero + kInfinity<V>);
        }
        // Element i is sampled if its running sum exceeds a threshold that the previous sum does not. If two thresholds
        // meet in one element, or one is past the end, fewer than `remaining` are found.
        const V step = rest / remaining;
        V sum = zero, below = zero;
        for (int i = 0; i < block; ++i) {
            sum += open[i];
            V count = zero;
            for (int j = 0; j < n_keep; ++j) count += keep(greater(sum, thresholds[j]), one);
            const auto sampled = greater(count, below);
            const auto saturated = equal(open[i], zero) & ~equal(x[i], zero);
            y[i] = select(sampled, copy_sign(step, x[i]), keep(saturated, x[i]));
            remaining -= keep(sampled, one);
            below = count;
        }
        return left | ~equal(remaining, zero);
    }
};

}  // namespace nmcompile::NMCOMPILE_ISA
