// Copies a block of the dense operand into a panel: a row of lanes for each element of depth.
#pragma once

#include "axis_walk.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kTileVectors = 8;  // at most: so many sums in registers hide the latency of a multiply-add
constexpr int kTileLanes = kTileVectors * kFloats;

// The lanes of one tile, and the runs of them that lie side by side in memory.
struct TileOfLanes {
    Point points[kTileLanes];
    Run runs[kTileLanes];
    Index count, run_count, width;  // width: of a panel's row, in whole vectors

    TileOfLanes(const GemmAxis& axis, Index first, Index last) : count(last - first) {
        width = (count + kFloats - 1) / kFloats * kFloats;
        walk(axis, first, count, points);
        for (Index lane = count; lane < width; ++lane) points[lane] = points[0];  // read by nobody, but addressed
        run_count = 0;
        for (Index lane = 0; lane < count; lane += runs[run_count++].length) {
            runs[run_count] = run_from(points, lane, count, 1);
        }
    }
};

// Lanes in runs: one load and one store for each run and element of depth. A store may go beyond its run: the next run,
// or the next row, overwrites that, and behind the last row is room for it.
template <class T>
void copy_runs(const GemmJob<T>& job, const TileOfLanes& tile, const Point* depth, Index count, float* panel) {
    Inside inside[kTileLanes];
    for (Index k = 0; k < count; ++k) {
        if (k == 0 || depth[k].y != depth[k - 1].y || depth[k].x != depth[k - 1].x) {
            for (Index i = 0; i < tile.run_count; ++i) inside[i] = inside_image(job, tile.runs[i], depth[k]);
        }
        const T* from = job.dense + depth[k].offset;
        float* row = panel + k * tile.width;
        // Lanes behind the last are multiplied too, and what memory happens to hold may be denormal: very slow.
        store(Floats{}, row + tile.width - kFloats);
        for (Index i = 0; i < tile.run_count; ++i) {
            store(load_between(from + tile.runs[i].start.offset, inside[i]), row + tile.runs[i].first);
        }
    }
}

// Depth in runs, `stride` apart: squares of lanes and depth, transposed.
template <class T>
void transpose_run(const GemmJob<T>& job, const TileOfLanes& tile, const Run& run, const Inside* inside, Index stride,
                   float* panel) {
    const T* from = job.dense + run.start.offset;
    for (Index lane = 0; lane < tile.width; lane += kFloats) {
        Floats square[kFloats];
#pragma GCC unroll 16
        for (Index i = 0; i < kFloats; ++i) square[i] = load_between(from + tile.points[lane + i].offset, inside[lane + i]);
        transpose(square);
        for (Index k = 0; k < run.length; ++k) store(square[k], panel + (run.first + k * stride) * tile.width + lane);
    }
}

template <class T>
void transpose_runs(const GemmJob<T>& job, const TileOfLanes& tile, const Point* depth, Index count, float* panel) {
    // Where a block runs across two or four samples, each of them has runs of its own.
    Index stride = 4;
    while (stride > 1 && !(stride < count && depth[stride].offset == depth[0].offset + 1)) stride /= 2;
    Inside inside[kTileLanes];
    for (Index lane = tile.count; lane < tile.width; ++lane) inside[lane] = {0, 0};
    Run last{};
    for (Index series = 0; series < smaller(stride, count); ++series) {
        for (Index k = series; k < count;) {
            const Run run = run_from(depth, k, count, stride);
            if (!run.is_placed_like(last)) {
                for (Index i = 0; i < tile.count; ++i) inside[i] = inside_image(job, run, tile.points[i]);
            }
            transpose_run(job, tile, run, inside, stride, panel);
            k += run.length * stride;
            last = run;
        }
    }
}

// Returns how many rows it has: behind the last element of depth follow zeros, as kernels read some at once.
template <class T>
Index fill_panel(const GemmJob<T>& job, const TileOfLanes& tile, Index block, float* panel) {
    const Index count = smaller(kDepthBlock, job.dense_depth.size - block * kDepthBlock);
    Point depth[kDepthBlock];
    walk(job.dense_depth, block * kDepthBlock, count, depth);
    if (tile.run_count * 4 <= tile.count) {
        copy_runs(job, tile, depth, count, panel);
    } else {
        transpose_runs(job, tile, depth, count, panel);
    }
    const Index rows = (count + 15) / 16 * 16;
    for (Index i = count * tile.width; i < rows * tile.width; ++i) panel[i] = 0.0f;
    return rows;
}

}  // namespace nmcompile::NMCOMPILE_ISA
