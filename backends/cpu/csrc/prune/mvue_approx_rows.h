// The approximate MVUE of nmcompile/pruning/mvue_paper.py for 2:4, one block per lane.
#pragma once

#include "prune/drawn_rows.h"

namespace nmcompile::NMCOMPILE_ISA {

struct MvueApprox {
    static constexpr int kDraws = 2;

    template <class T>
    static void prune_scalar(const ScalarBlock<T>& block) {
        scalar_mvue_approx(block);
    }

    template <class V>
    static NMCOMPILE_INLINE Mask<V> prune(const V* x, V* y, const V* u, Constant<2>, Constant<4>) {
        const V zero = {}, one = zero + 1;
        V a[4];
        Mask<V> empty[4], first[4], second[4];
        for (int i = 0; i < 4; ++i) {
            a[i] = absolute(x[i]);
            empty[i] = equal(a[i], zero);
        }
        const auto few =
            (empty[0] & empty[1]) | (empty[2] & empty[3]) | ((empty[0] | empty[1]) & (empty[2] | empty[3]));
        const V total = a[0] + a[1] + a[2] + a[3];
        V open[4] = {a[0], a[1], a[2], a[3]};
        auto left = draw(open, u[0], first);
        for (int i = 0; i < 4; ++i) open[i] = keep(~first[i], open[i]);
        left = left | draw(open, u[1], second);

        // Equation (25): each sum omits one element, and adds the others in index order.
        const V odds[4] = {a[0] / (a[1] + a[2] + a[3]), a[1] / (a[0] + a[2] + a[3]), a[2] / (a[0] + a[1] + a[3]),
                           a[3] / (a[0] + a[1] + a[2])};
        const V terms[4] = {one + (odds[1] + odds[2] + odds[3]), one + (odds[0] + odds[2] + odds[3]),
                            one + (odds[0] + odds[1] + odds[3]), one + (odds[0] + odds[1] + odds[2])};
        // Only two of the four quotients total / terms[i] are needed.
        V divisor = terms[0];
        for (int i = 1; i < 4; ++i) divisor = select(first[i], terms[i], divisor);
        const V first_value = total / divisor;
        for (int i = 0; i < 4; ++i) divisor = select(second[i], terms[i], divisor);
        const V second_value = total / divisor;
        for (int i = 0; i < 4; ++i) {
            const V value = larger(a[i], select(second[i], second_value, first_value));
            y[i] = select(few, x[i] + zero, keep(first[i] | second[i], copy_sign(value, x[i])));
        }
        return left.without(few) | ~at_least(zero + kLargest<V>, total);
    }

   private:
    // Selects the element that holds u times the sum of `a`. Returns the lanes where rounding leaves none.
    template <class V>
    static NMCOMPILE_INLINE Mask<V> draw(const V* a, V u, Mask<V>* chosen) {
        V sums[4] = {a[0]};
        for (int i = 1; i < 4; ++i) sums[i] = sums[i - 1] + a[i];
        const V threshold = u * sums[3];
        auto before = greater(sums[0], threshold);
        chosen[0] = before;
        for (int i = 1; i < 4; ++i) {
            const auto now = greater(sums[i], threshold);
            chosen[i] = now.without(before);
            before = now;
        }
        return ~before;
    }
};

}  // namespace nmcompile::NMCOMPILE_ISA
