// Transfers of the units of a run from memory into rows, and back.
#pragma once

#include <cstdint>

#include "prune/block_run.h"
#include "prune/rows.h"

namespace nmcompile::NMCOMPILE_ISA {

using Index = std::int64_t;

enum class Layout {
    units,   // unit after unit, without gaps
    lanes,   // the same element of neighbouring units side by side, all units whole
    spread,  // anything else
};

// `length` elements of each unit exist, at most `unit`, which is 2, 4 or 8 if units come without gaps.
inline Layout layout_of(Index stride, Index lane, Index length, int unit) {
    if (length < unit) return Layout::spread;
    if (lane == 1) return Layout::lanes;
    return stride == 1 && lane == unit && (unit == 2 || unit == 4 || unit == 8) ? Layout::units : Layout::spread;
}

// The elements of the units of a run; `Unit` is a Constant or int.
template <class T, Layout kLayout, class Unit>
class RunAccess {
   public:
    RunAccess(T* data, Index stride, Index lane, Index length, Unit unit, bool streams = false)
        : data_(data), stride_(stride), lane_(lane), length_(length), unit_(unit) {
        streams_ = streams && (kLayout == Layout::units || stride * sizeof(T) % kBytes == 0);
    }

    NMCOMPILE_INLINE void read(Index first, Index count, Row<T>* rows) const {
        if (kLayout == Layout::spread || count < kCount) {
            Row<T> gathered[kMaxBlock];  // a copy, so `rows` need not be in memory
            gather(first, count, gathered);
            for (int i = 0; i < unit_; ++i) rows[i] = gathered[i];
        } else if constexpr (kLayout == Layout::units) {
            // Drawing numbers takes longer than the core looks ahead.
            for (int i = 0; i < unit_; ++i) __builtin_prefetch(data_ + first * unit_ + i * kCount + kAhead);
            for (int i = 0; i < unit_; ++i) rows[i] = load<Row<T>>(data_ + first * unit_ + i * kCount);
            unzip_rows<Unit{}>(rows);
        } else {
            for (int i = 0; i < unit_; ++i) rows[i] = load<Row<T>>(data_ + i * stride_ + first);
        }
    }

    NMCOMPILE_INLINE void write(Index first, Index count, Row<T>* rows) const {
        if (kLayout == Layout::spread || count < kCount) {
            Row<T> scattered[kMaxBlock];
            for (int i = 0; i < unit_; ++i) scattered[i] = rows[i];
            scatter(first, count, scattered);
            return;
        }
        T* const begin = data_ + first * (kLayout == Layout::units ? static_cast<Index>(unit_) : 1);
        const bool streams = streams_ && reinterpret_cast<std::uintptr_t>(begin) % kBytes == 0;
        const auto put = [&](Row<T> row, T* to) { streams ? stream(row, to) : store(row, to); };
        if constexpr (kLayout == Layout::units) {
            zip_rows<Unit{}>(rows);
            for (int i = 0; i < unit_; ++i) put(rows[i], begin + i * kCount);
        } else {
            for (int i = 0; i < unit_; ++i) put(rows[i], begin + i * stride_);
        }
    }

   private:
    static constexpr int kCount = kLanesOf<Row<T>>;
    static constexpr std::uintptr_t kBytes = sizeof(Row<T>);
    static constexpr Index kAhead = 2048 / sizeof(T);

    [[gnu::noinline]] void gather(Index first, Index count, Row<T>* rows) const {
        for (int i = 0; i < unit_; ++i) {
            std::remove_const_t<T> row[kCount] = {};
            for (Index l = 0; i < length_ && l < count; ++l) row[l] = data_[i * stride_ + (first + l) * lane_];
            rows[i] = load<Row<T>>(row);
        }
    }

    [[gnu::noinline]] void scatter(Index first, Index count, const Row<T>* rows) const {
        for (int i = 0; i < length_; ++i) {
            T row[kCount];
            store(rows[i], row);
            for (Index l = 0; l < count; ++l) data_[i * stride_ + (first + l) * lane_] = row[l];
        }
    }

    T* data_;
    Index stride_, lane_, length_;
    Unit unit_;
    bool streams_;
};

}  // namespace nmcompile::NMCOMPILE_ISA
