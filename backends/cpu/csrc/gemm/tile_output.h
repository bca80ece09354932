// Writes sums to their places in the output, with the bias of each row.
#pragma once

#include "gemm/dense_panel.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T>
void write_row_runs(const GemmJob<T>& job, const PanelLanes& to, Index first_row, Index last_row, const float* sums) {
    for (Index row = first_row; row < last_row; ++row) {
        const float bias = job.bias ? widen(job.bias[row]) : 0.0f;
        const float* from = sums + (row - first_row) * to.width;
        T* output = job.output + row * job.output_row;
        for (Index i = 0; i < to.run_count; ++i) {
            const Run& run = to.runs[i];
            store_first(load<Floats>(from + run.first) + bias, run.length, output + run.start.offset);
        }
    }
}

// Rows are contiguous in the output. All rows of a few lanes, then of the next: a lane is often a page of its own.
template <class T>
void write_transposed(const GemmJob<T>& job, const PanelLanes& to, Index first_row, Index last_row, const float* sums) {
    const Index whole = first_row + (last_row - first_row) / kFloats * kFloats;
    for (Index lane = 0; lane < to.count; lane += kFloats) {
        for (Index row = first_row; row < whole; row += kFloats) {
            const Floats bias = job.bias ? Memory<T>::read(job.bias + row) : Floats{};
            Floats square[kFloats];
            for (Index r = 0; r < kFloats; ++r) square[r] = load<Floats>(sums + (row - first_row + r) * to.width + lane);
            transpose(square);
            for (Index i = 0; i < smaller(kFloats, to.count - lane); ++i) {
                Memory<T>::write(square[i] + bias, job.output + to.points[lane + i].offset + row);
            }
        }
    }
    write_row_runs(job, to, whole, last_row, sums + (whole - first_row) * to.width);
}

template <class T>
void write_output(const GemmJob<T>& job, const PanelLanes& to, Index first_row, Index last_row, const float* sums) {
    (job.output_row == 1 ? write_transposed<T> : write_row_runs<T>)(job, to, first_row, last_row, sums);
}

}  // namespace nmcompile::NMCOMPILE_ISA
