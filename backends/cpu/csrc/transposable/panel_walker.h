// Walks a strided tensor panel by panel. A panel goes through a buffer if its elements do not lie row by row, or if the
// edge of the tensor cuts it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "transposable/tile_panel.h"
#include "transposable/transposable.h"

namespace nmcompile::NMCOMPILE_ISA {

using Index = std::int64_t;

// The start of a panel: its row and column, and its place among the batch dims.
struct Place {
    Index row, column, batch[kMaxBatchDims];
};

template <class Element>
struct Matrix {
    Element* data;
    Index row, column;  // strides
};

// The inner loop follows the memory order.
template <class Element>
void copy_matrix(Matrix<Element> from, Matrix<Element> to, Index rows, Index columns) {
    if (from.row * to.row < from.column * to.column) {
        std::swap(from.row, from.column);
        std::swap(to.row, to.column);
        std::swap(rows, columns);
    }
    for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < columns; ++c) {
            to.data[r * to.row + c * to.column] = from.data[r * from.row + c * from.column];
        }
    }
}

template <class T>
class PanelWalker {
   public:
    explicit PanelWalker(const TransposableJob& job) : job_(job) {
        counts_[kRow] = (job.rows + 7) / 8;
        counts_[kColumn] = (job.columns + kColumns - 1) / kColumns;
        Index strides[] = {job.x.row, job.x.column, std::numeric_limits<Index>::max()};
        for (int i = 0; i < job.batch_dims; ++i) {
            counts_[kMatrix] *= job.batch[i];
            if (job.batch[i] > 1) strides[kMatrix] = std::min(strides[kMatrix], job.x.batch[i]);
        }
        // Walks in memory order: panels that share cache lines or pages follow each other.
        std::sort(order_, order_ + 3, [&](int a, int b) { return strides[a] < strides[b]; });
        streams_ = panels() * 8 * kColumns * static_cast<Index>(sizeof(T)) >= kStreamedBytes &&
                   aligned<std::uint8_t>(job.mask) && aligned<T>(job.pruned) && aligned<T>(job.forward_values) &&
                   aligned<T>(job.backward_values) && aligned<std::uint8_t>(job.backward_indices);
    }

    Index panels() const { return counts_[kRow] * counts_[kColumn] * counts_[kMatrix]; }

    void run(Index first, Index last) {
        for (Index panel = first; panel < last; ++panel) prune(place(panel));
        finish_streaming();
    }

   private:
    enum Axis { kRow, kColumn, kMatrix };
    static constexpr int kColumns = kPanelColumns<T>;
    static constexpr Index kStreamedBytes = 1 << 23;  // bytes of a weight whose results would not stay in a cache

    // Returns whether every row starts where vectors can be streamed to.
    template <class Element>
    bool aligned(const TileOperand& operand) const {
        constexpr Index kVector = NMCOMPILE_VECTOR_BYTES, kSize = sizeof(Element);
        if (reinterpret_cast<std::uintptr_t>(operand.data) % kVector != 0) return false;
        const auto keeps = [](Index stride) { return stride * kSize % kVector == 0; };
        return keeps(operand.row) && std::all_of(operand.batch, operand.batch + job_.batch_dims, keeps);
    }

    Place place(Index panel) const {
        Index index[3];
        for (const int axis : order_) {
            index[axis] = panel % counts_[axis];
            panel /= counts_[axis];
        }
        Place place{index[kRow] * 8, index[kColumn] * kColumns, {}};
        Index matrix = index[kMatrix];
        for (int i = job_.batch_dims; i-- > 0;) {
            place.batch[i] = matrix % job_.batch[i];
            matrix /= job_.batch[i];
        }
        return place;
    }

    // The part of an operand that belongs to a panel: `Rows` x `Columns` elements for a full panel.
    template <class Element, int Rows, int Columns>
    struct Part {
        static constexpr Index kRowsPer = 8 / Rows, kColumnsPer = kColumns / Columns;

        Part(const TileOperand& operand, const Place& place, const TransposableJob& job) {
            if (operand.data == nullptr) return;
            data = static_cast<Element*>(operand.data) + place.row / kRowsPer * operand.row +
                   place.column / kColumnsPer * operand.column;
            for (int i = 0; i < job.batch_dims; ++i) data += place.batch[i] * operand.batch[i];
            row = operand.row;
            column = operand.column;
            rows = std::min<Index>(Rows, (job.rows - place.row + kRowsPer - 1) / kRowsPer);
            columns = std::min<Index>(Columns, (job.columns - place.column + kColumnsPer - 1) / kColumnsPer);
            direct = column == 1 && job.rows - place.row >= 8 && job.columns - place.column >= kColumns;
        }
        bool buffered() const { return data != nullptr && !direct; }

        // The memory that the kernel reads or writes.
        template <class View>
        View view() {
            if (data == nullptr) return {nullptr, 0};
            return direct ? View{data, row} : View{buffer, Columns};
        }
        void fill_buffer() {
            if (rows < Rows || columns < Columns) std::fill_n(buffer, Rows * Columns, Element{});
            copy_matrix<Element>({data, row, column}, {buffer, Columns, 1}, rows, columns);
        }
        void empty_buffer() { copy_matrix<Element>({buffer, Columns, 1}, {data, row, column}, rows, columns); }

        Element* data = nullptr;
        Index row = 0, column = 0, rows = 0, columns = 0;
        bool direct = false;
        alignas(64) Element buffer[Rows * Columns];
    };

    void prune(const Place& place) const {
        Part<T, 8, kColumns> x(job_.x, place, job_);
        Part<std::uint8_t, 8, kColumns> mask(job_.mask, place, job_);
        Part<T, 8, kColumns> pruned(job_.pruned, place, job_);
        Part<T, 8, kColumns / 2> forward_values(job_.forward_values, place, job_);
        Part<std::uint8_t, 8, kColumns / 8> forward_indices(job_.forward_indices, place, job_);
        Part<T, 4, kColumns> backward_values(job_.backward_values, place, job_);
        Part<std::uint8_t, 1, kColumns> backward_indices(job_.backward_indices, place, job_);
        if (x.buffered()) x.fill_buffer();

        using P = Panel<T>;
        using Bytes = typename P::template Rows<std::uint8_t>;
        using Elements = typename P::template Rows<T>;
        const P panel = {
            .x = x.template view<typename P::template Rows<const T>>(),
            .mask = mask.template view<Bytes>(),
            .pruned = pruned.template view<Elements>(),
            .forward_values = forward_values.template view<Elements>(),
            .backward_values = backward_values.template view<Elements>(),
            .forward_indices = forward_indices.template view<Bytes>(),
            .backward_indices = backward_indices.template view<Bytes>(),
        };
        const auto buffered = [](const auto&... parts) { return (parts.buffered() || ...); };
        if (streams_ && !buffered(mask, pruned, forward_values, forward_indices, backward_values, backward_indices)) {
            PanelPruner<T, true>(panel).run();
            return;
        }
        PanelPruner<T, false>(panel).run();

        // A last group without a neighbour leaves half of its byte zero.
        if (forward_indices.buffered() && job_.columns - place.column < kColumns && job_.columns % 8 != 0) {
            std::uint8_t* const last = forward_indices.buffer + forward_indices.columns - 1;
            for (Index r = 0; r < 8; ++r) last[r * (kColumns / 8)] &= 15;
        }
        if (backward_indices.buffered() && job_.rows - place.row < 8) {
            for (std::uint8_t& byte : backward_indices.buffer) byte &= 15;
        }
        const auto empty = [](auto&... parts) { ((parts.buffered() ? parts.empty_buffer() : void()), ...); };
        empty(mask, pruned, forward_values, forward_indices, backward_values, backward_indices);
    }

    const TransposableJob& job_;
    Index counts_[3] = {1, 1, 1};  // of panels
    int order_[3] = {kRow, kColumn, kMatrix};  // from the inner loop to the outer
    bool streams_ = false;
};

}  // namespace nmcompile::NMCOMPILE_ISA
