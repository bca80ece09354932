// The input of the pruning kernels: blocks at equal distances in memory, one per SIMD lane.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace nmcompile {

constexpr int kMaxBlock = 32;
constexpr int kPackedUnit = 8;   // elements that share a byte of indices: two groups of four
constexpr int kPackedGroup = 4;  // elements of which a packed form keeps two

// Values of the input's type, zero where pruned; packed values; or a byte for each element, 1 where it is kept.
enum class Form { values, packed, mask };

enum class Operator { mvue, mvue_approx, greedy, greedy_by_value };

inline Operator operator_of(std::string_view name) {
    constexpr std::string_view kNames[] = {"mvue", "mvue_approx", "greedy", "greedy_by_value"};
    for (int i = 0; i < 4; ++i) {
        if (name == kNames[i]) return static_cast<Operator>(i);
    }
    throw std::invalid_argument("there is no kernel for operator " + std::string(name));
}

struct Rule {
    int n_keep, block;
    bool relu;          // prune max(x, 0)
    bool streams;       // the output is too large to stay in a cache
    std::uint64_t key;  // key of the random numbers
};

// Units of `length` elements: blocks, or the kPackedUnit elements of a byte if the output is packed. A shorter unit
// counts as padded with zeros. Strides count elements, and bytes for the indices.
struct Run {
    const void* in;
    void* out;              // values, if the output is packed
    std::uint8_t* indices;  // of a packed output
    std::int64_t in_stride, out_stride;                      // from element to element
    std::int64_t in_lane, out_lane, index_lane;              // from unit to unit
    std::int64_t length, count;                              // elements of a unit, and units
    // The first block of unit l has the number number + (first + l) % inner * number_inner + (first + l) / inner *
    // number_outer.
    std::uint64_t number, number_inner, number_outer, number_block;  // number_block: from block to block of a unit
    std::int64_t inner, first;

    bool numbers_are_even() const { return first + count <= inner; }  // equal steps from unit to unit
};

}  // namespace nmcompile
