// Writes rows of ones and zeros, whatever the size of their elements, as a mask: a byte for each element.
#pragma once

#include <cstdint>

#include "prune/run_access.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T, Layout kLayout, class Unit>
class MaskWriter {
   public:
    MaskWriter(const Run& run, Unit unit)
        : data_(static_cast<std::uint8_t*>(run.out)),
          stride_(run.out_stride),
          lane_(run.out_lane),
          length_(run.length),
          unit_(unit) {}

    NMCOMPILE_INLINE void write(Index first, Index count, Row<T>* rows) const {
        if (kLayout == Layout::spread || count < kCount) {
            scatter(first, count, rows);
        } else if constexpr (kLayout == Layout::units) {
            zip_rows<Unit{}>(rows);
            for (int i = 0; i < unit_; ++i) store(bytes(rows[i]), data_ + first * unit_ + i * kCount);
        } else {
            for (int i = 0; i < unit_; ++i) store(bytes(rows[i]), data_ + i * stride_ + first);
        }
    }

   private:
    static constexpr int kCount = kLanesOf<Row<T>>;
    using Bytes = Vector<std::uint8_t, kCount>;

    static NMCOMPILE_INLINE Bytes bytes(Row<T> row) { return __builtin_convertvector(row, Bytes); }

    NMCOMPILE_INLINE void scatter(Index first, Index count, const Row<T>* rows) const {
        for (int i = 0; i < length_; ++i) {
            const Bytes row = bytes(rows[i]);
            for (Index l = 0; l < count; ++l) data_[i * stride_ + (first + l) * lane_] = row[l];
        }
    }

    std::uint8_t* data_;
    Index stride_, lane_, length_;
    Unit unit_;
};

}  // namespace nmcompile::NMCOMPILE_ISA
