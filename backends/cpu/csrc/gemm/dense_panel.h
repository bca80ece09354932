// Copies a block of the dense operand into a panel: a row of lanes for each element of depth.
#pragma once

#include "gemm/axis_walk.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kMostVectors = 8;  // vectors of a panel; that many sums in registers hide the latency of a multiply-add
constexpr int kMostLanes = kMostVectors * kFloats;

// The lanes that share a panel, and the runs in which they are contiguous in memory.
struct PanelLanes {
    Point points[kMostLanes];
    Run runs[kMostLanes];
    Index count, run_count, width;  // width: row length of a panel, in whole vectors

    PanelLanes(const GemmAxis& axis, Index first, Index last, Index width) : count(last - first), width(width) {
        walk(axis, first, count, points);
        for (Index lane = count; lane < width; ++lane) points[lane] = points[0];  // never used, but addressed
        run_count = 0;
        for (Index lane = 0; lane < count; lane += runs[run_count++].length) {
            runs[run_count] = run_from(points, lane, count, 1);
        }
    }
};

constexpr Index kAhead = 8;  // rows that are prefetched

// Copies runs of lanes: one load and one store for each run and element of depth. A store may write past its run: the
// next run or row overwrites that, and there is room for it after the last row.
template <class T>
void copy_runs(const GemmJob<T>& job, const PanelLanes& lanes, const Point* depth, Index count, float* panel) {
    Inside inside[kMostLanes];
    for (Index k = 0; k < count; ++k) {
        if (k == 0 || depth[k].y != depth[k - 1].y || depth[k].x != depth[k - 1].x) {
            for (Index i = 0; i < lanes.run_count; ++i) inside[i] = inside_image(job, lanes.runs[i], depth[k]);
        }
        const T* from = job.dense + depth[k].offset;
        const T* ahead = job.dense + depth[smaller(k + kAhead, count - 1)].offset;
        float* row = panel + k * lanes.width;
        // Lanes after the last are multiplied too. Clear them: their memory may hold denormals, which are very slow.
        for (Index lane = lanes.count / kFloats * kFloats; lane < lanes.width; lane += kFloats) store(Floats{}, row + lane);
        for (Index i = 0; i < lanes.run_count; ++i) {
            store(load_between(from + lanes.runs[i].start.offset, inside[i]), row + lanes.runs[i].first);
            __builtin_prefetch(ahead + lanes.runs[i].start.offset);
        }
    }
}

// Copies runs of depth, `stride` apart: squares of lanes and depth, transposed.
template <class T>
void transpose_run(const GemmJob<T>& job, const PanelLanes& lanes, const Run& run, const Inside* inside, Index stride,
                   float* panel) {
    const T* from = job.dense + run.start.offset;
    for (Index lane = 0; lane < lanes.width; lane += kFloats) {
        Floats square[kFloats];
#pragma GCC unroll 16
        for (Index i = 0; i < kFloats; ++i) {
            const T* const row = from + lanes.points[lane + i].offset;
            square[i] = load_between(row, inside[lane + i]);
            __builtin_prefetch(row + kFloats);
        }
        transpose(square);
        for (Index k = 0; k < run.length; ++k) store(square[k], panel + (run.first + k * stride) * lanes.width + lane);
    }
}

template <class T>
void transpose_runs(const GemmJob<T>& job, const PanelLanes& lanes, const Point* depth, Index count, float* panel) {
    // If a block runs across two or four samples, each of them has runs of its own.
    Index stride = 4;
    while (stride > 1 && !(stride < count && depth[stride].offset == depth[0].offset + 1)) stride /= 2;
    Inside inside[kMostLanes];
    for (Index lane = lanes.count; lane < lanes.width; ++lane) inside[lane] = {0, 0};
    Run last{};
    for (Index series = 0; series < smaller(stride, count); ++series) {
        for (Index k = series; k < count;) {
            const Run run = run_from(depth, k, count, stride);
            if (!run.is_placed_like(last)) {
                for (Index i = 0; i < lanes.count; ++i) inside[i] = inside_image(job, run, lanes.points[i]);
            }
            transpose_run(job, lanes, run, inside, stride, panel);
            k += run.length * stride;
            last = run;
        }
    }
}

// Returns the panel's number of rows. Zeros follow the last element of depth, as kernels read several rows at once.
template <class T>
Index fill_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, float* panel) {
    const Index count = smaller(kDepthBlock, job.dense_depth.size - block * kDepthBlock);
    Point depth[kDepthBlock];
    walk(job.dense_depth, block * kDepthBlock, count, depth);
    if (lanes.run_count * 4 <= lanes.count) {
        copy_runs(job, lanes, depth, count, panel);
    } else {
        transpose_runs(job, lanes, depth, count, panel);
    }
    const Index rows = (count + 15) / 16 * 16;
    for (Index i = count * lanes.width; i < rows * lanes.width; ++i) panel[i] = 0.0f;
    return rows;
}

}  // namespace nmcompile::NMCOMPILE_ISA
