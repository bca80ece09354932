// The best transposable 2:4 mask of 4x4 tiles, one tile per lane, as nmcompile/pruning/tile_enumeration.py defines it:
// the same sums in the same order, and the same winner among equals.
//
// A mask is 16 bits, bit 4 * row + column. A half is two rows, each with one of six pairs of columns; the halves are
// ordered by the pairs of their rows. What a top half leaves to the bottom half depends only on how many elements it
// keeps per column: the 36 halves fall into 19 classes. So the best bottom half of every class is found first, then the
// best top half: 90 masks with 36 sums and 35 comparisons.
#pragma once

#include <array>
#include <limits>

#include "machine/lanes.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kHalves = 36, kClasses = 19;
constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};  // in lexicographic order

struct HalfTable {
    int bits[kHalves];        // its mask, 8 bits
    int of_class[kHalves];    // the class of its column counts
    int complement[kHalves];  // the class that fills its columns up to two
    bool first[kHalves];      // whether it is the first of its class
};

consteval HalfTable half_table() {
    HalfTable table{};
    std::array<std::array<int, 4>, kClasses> counts{};
    int classes = 0;
    const auto counts_of = [](int half) {
        std::array<int, 4> result{};
        for (const int row : {half / 6, half % 6}) {
            for (const int column : kPairs[row]) ++result[column];
        }
        return result;
    };
    const auto find = [&](const std::array<int, 4>& wanted) {
        int index = 0;
        while (index < classes && counts[index] != wanted) ++index;
        return index;
    };
    for (int half = 0; half < kHalves; ++half) {
        const int index = find(counts_of(half));
        table.first[half] = index == classes;
        if (table.first[half]) counts[classes++] = counts_of(half);
        table.of_class[half] = index;
        for (const int row : {0, 1}) {
            for (const int column : kPairs[row ? half % 6 : half / 6]) table.bits[half] |= 1 << (4 * row + column);
        }
    }
    for (int half = 0; half < kHalves; ++half) {
        std::array<int, 4> left = counts_of(half);
        for (int& count : left) count = 2 - count;
        table.complement[half] = find(left);
    }
    return table;
}

constexpr HalfTable kTable = half_table();

// Returns |w| of a tile for sums over it, as `tile_magnitudes` in tiles.py, on all lanes. `a` may be NaN or infinite.
template <class T>
inline void make_summable(typename Lanes<T>::Reals (&a)[16]) {
    using L = Lanes<T>;
    using Real = typename L::Real;
    using Ints = typename L::Ints;
    using Reals = typename L::Reals;
    // The bits of non-negative numbers order like the numbers, with infinity and NaN above all.
    const auto bits = [](Reals x) { return std::bit_cast<Ints>(x); };
    const Ints bound = bits(Reals{} + std::numeric_limits<Real>::max() / 16);
    Ints top = bits(a[0]);
    for (int e = 1; e < 16; ++e) top = larger(top, bits(a[e]));
    const Ints large = top > bound;
    if (!any(large)) [[likely]] return;
    const Ints infinity = bits(Reals{} + std::numeric_limits<Real>::infinity());
    Ints largest = {};
    for (const Reals& x : a) {
        const Ints finite = bits(x) < infinity ? bits(x) : Ints{};
        largest = larger(largest, finite);
    }
    const Reals divisor = largest > Ints{} ? std::bit_cast<Reals>(largest) : Reals{} + 1;
    for (Reals& x : a) {
        const Reals scaled = bits(x) < infinity ? x / divisor : Reals{} + 32;
        x = large ? scaled : x;
    }
}

// A sum, as the bits of its float, and the mask that it belongs to.
template <class Ints>
struct Best {
    Ints sum, mask;
};

template <class Ints>
inline Best<Ints> better(const Best<Ints>& earlier, const Best<Ints>& later) {
    return {larger(earlier.sum, later.sum), later.sum > earlier.sum ? later.mask : earlier.mask};
}

template <class T>
class TileSearch {
   public:
    using L = Lanes<T>;
    using Ints = typename L::Ints;
    using Reals = typename L::Reals;

    // Returns the best mask of every lane; `a` holds the summable |w|, row by row.
    static Ints run(const Reals (&a)[16]) {
        TileSearch search;
        for (int row = 0; row < 4; ++row) {
            for (int pair = 0; pair < 6; ++pair) {
                search.rows_[row][pair] = a[4 * row + kPairs[pair][0]] + a[4 * row + kPairs[pair][1]];
            }
        }
        search.find_bottoms(std::make_integer_sequence<int, kHalves>{});
        return search.template best_of<0, kHalves>().mask;
    }

   private:
    Ints half_sum(int upper, int half) const {
        return std::bit_cast<Ints>(rows_[upper][half / 6] + rows_[upper + 1][half % 6]);
    }

    template <int... Half>
    void find_bottoms(std::integer_sequence<int, Half...>) {
        (find_bottom<Half>(), ...);
    }

    template <int Half>
    void find_bottom() {
        const Best<Ints> found = {half_sum(2, Half), Ints{} + (kTable.bits[Half] << 8)};
        Best<Ints>& best = bottoms_[kTable.of_class[Half]];
        best = kTable.first[Half] ? found : better(best, found);
    }

    // Searches the top halves First, ..., Last - 1 with their best bottoms. Splitting in two keeps the first of equals,
    // and the chain of comparisons short.
    template <int First, int Last>
    Best<Ints> best_of() const {
        if constexpr (Last - First == 1) {
            const Best<Ints>& bottom = bottoms_[kTable.complement[First]];
            const Reals sum = std::bit_cast<Reals>(half_sum(0, First)) + std::bit_cast<Reals>(bottom.sum);
            return {std::bit_cast<Ints>(sum), bottom.mask | kTable.bits[First]};
        } else {
            constexpr int kMiddle = (First + Last) / 2;
            return better(best_of<First, kMiddle>(), best_of<kMiddle, Last>());
        }
    }

    Reals rows_[4][6];
    Best<Ints> bottoms_[kClasses];
};

}  // namespace nmcompile::NMCOMPILE_ISA
