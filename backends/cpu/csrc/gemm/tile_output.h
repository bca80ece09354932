// Writes sums to their places in the output, with the bias of each row.
#pragma once

#include "gemm/dense_panel.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T>
void write_row_runs(const GemmJob<T>& job, const PanelLanes& to, Index first_row, Index last_row, const float* sums,
                    const Strides& strides) {
    for (Index row = first_row; row < last_row; ++row) {
        const float bias = job.bias ? widen(job.bias[row]) : 0.0f;
        const float* from = sums + (row - first_row) * strides.row;
        T* output = job.output + row * job.output_row;
        for (Index i = 0; i < to.run_count; ++i) {
            const Run& run = to.runs[i];
            store_first(load<Floats>(from + strides.of_lane(run.first)) + bias, run.length, output + run.start.offset);
        }
    }
}

// Prefetches where a vector of rows of the lanes from `lane` on goes: each lane is a cache line elsewhere.
template <class T>
void fetch_output(const GemmJob<T>& job, const PanelLanes& to, Index lane, Index row) {
    for (Index i = 0; i < kFloats; ++i) __builtin_prefetch(job.output + to.points[lane + i].offset + row, 1);
}

// Rows are contiguous in the output. All rows of a few lanes, then of the next: a lane is often a page of its own.
template <class T>
void write_transposed(const GemmJob<T>& job, const PanelLanes& to, Index first_row, Index last_row, const float* sums,
                      const Strides& strides) {
    const Index whole = first_row + (last_row - first_row) / kFloats * kFloats;
    for (Index lane = 0; lane < to.count; lane += kFloats) {
        for (Index row = first_row; row < whole; row += kFloats) {
            const Floats bias = job.bias ? Memory<T>::read(job.bias + row) : Floats{};
            Floats square[kFloats];
            const float* const from = sums + (row - first_row) * strides.row + strides.of_lane(lane);
            for (Index r = 0; r < kFloats; ++r) square[r] = load<Floats>(from + r * strides.row);
            transpose(square);
            if (lane + 2 * kFloats <= to.count) fetch_output(job, to, lane + kFloats, row);
            for (Index i = 0; i < smaller(kFloats, to.count - lane); ++i) {
                Memory<T>::write(square[i] + bias, job.output + to.points[lane + i].offset + row);
            }
        }
    }
    write_row_runs(job, to, whole, last_row, sums + (whole - first_row) * strides.row, strides);
}

template <class T>
void write_output(const GemmJob<T>& job, const PanelLanes& to, Index first_row, Index last_row, const float* sums,
                  const Strides& strides) {
    (job.output_row == 1 ? write_transposed<T> : write_row_runs<T>)(job, to, first_row, last_row, sums, strides);
}

}  // namespace nmcompile::NMCOMPILE_ISA
