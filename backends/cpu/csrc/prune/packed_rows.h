// Packs rows of pruned elements in the form of nmcompile/pruning/packed.py.
#pragma once

#include <cstdint>

#include "prune/run_access.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T, Layout kLayout>
class PackedWriter {
   public:
    explicit PackedWriter(const Run& run, const Rule& rule)
        : run_(run),
          values_(static_cast<T*>(run.out), run.out_stride, run.out_lane, run.length / 2, {}, rule.streams) {}

    // Units of kPackedUnit elements; each group of four in them has at most two non-zeros.
    NMCOMPILE_INLINE void write(Index first, Index count, const Row<T>* pruned) {
        Row<T> values[4] = {};
        Row<T> codes = pack(pruned, values);
        if (run_.length > kPackedGroup) codes |= pack(pruned + kPackedGroup, values + 2) << 4;
        values_.write(first, count, values);
        using Bytes = Vector<std::uint8_t, kLanesOf<Row<T>>>;
        const Bytes bytes = __builtin_convertvector(codes, Bytes);
        if (run_.index_lane == 1 && count == kLanesOf<Row<T>>) {
            store(bytes, run_.indices + first);
        } else {
            for (Index l = 0; l < count; ++l) run_.indices[(first + l) * run_.index_lane] = bytes[l];
        }
    }

   private:
    // Finds the two values of a group and their places. Non-zeros are kept, then zeros from the first on.
    static NMCOMPILE_INLINE Row<T> pack(const Row<T>* x, Row<T>* values) {
        const auto is = [&](int i) { return ~equal(x[i] << 1, Row<T>{}); };  // ignores the sign
        const auto third = is(2), fourth = is(3), second_if_nonzero = is(1);
        const auto two_of = [](auto a, auto b, auto c) { return (a & b) | (a & c) | (b & c); };
        const auto first = ~two_of(second_if_nonzero, third, fourth);
        const auto second = ~two_of(first, third, fourth);
        const auto place = [](int i) { return Row<T>{} + static_cast<Bits<T>>(i); };
        values[0] = select(first, x[0], select(second, x[1], x[2]));
        values[1] = select(fourth, x[3], select(third, x[2], x[1]));
        return select(first, place(0), select(second, place(1), place(2))) |
               select(fourth, place(3 << 2), select(third, place(2 << 2), place(1 << 2)));
    }

    const Run& run_;
    RunAccess<T, kLayout, Constant<4>> values_;
};

}  // namespace nmcompile::NMCOMPILE_ISA
