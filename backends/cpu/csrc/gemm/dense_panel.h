// Copies a block of the dense operand into a panel: a row of lanes for each element of depth.
#pragma once

#include <algorithm>

#include "gemm/axis_walk.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kMostVectors = 8;  // vectors of a panel; that many sums in registers hide the latency of a multiply-add
constexpr int kMostLanes = kMostVectors * kFloats;

// The largest magnitude among floats as bits: the exponent bits of NaN and infinity are all set.
class Magnitudes {
   public:
    void add(const Floats& some) {
        const Words magnitude = std::bit_cast<Words>(some) << 1;
        largest_ = magnitude > largest_ ? magnitude : largest_;
    }
    bool are_finite() const { return !any(largest_ >= 0xFF000000u); }

   private:
    using Words = Vector<std::uint32_t, kFloats>;
    Words largest_{};
};

// Returns whether whole vectors of floats are all finite.
inline bool are_finite(const float* from, Index count) {
    Magnitudes magnitudes;
    for (Index i = 0; i < count; i += kFloats) magnitudes.add(load<Floats>(from + i));
    return magnitudes.are_finite();
}

// Distances in floats, of a panel or of sums: from a row of lanes to the next, and from a vector of lanes to the next.
struct Strides {
    Index row, vector;

    // Vector beside vector, so that runs of lanes may begin anywhere.
    static Strides side_by_side(Index width) { return {width, kFloats}; }
    // All rows of a vector, then those of the next: what runs through one vector at a time reads memory in order.
    static Strides in_turn(Index rows) { return {kFloats, rows * kFloats}; }

    Index of_lane(Index lane) const { return lane / kFloats * vector + lane % kFloats; }
};

// The lanes that share a panel, and the runs in which they are contiguous in memory.
struct PanelLanes {
    Point points[kMostLanes];
    Run runs[kMostLanes];
    Index count, run_count, width;  // width: number of lanes, in whole vectors
    bool is_checked;                // whether to look for values that are not finite

    PanelLanes(const GemmAxis& axis, Index first, Index last, Index width, bool is_checked)
        : count(last - first), width(width), is_checked(is_checked) {
        walk(axis, first, count, points);
        for (Index lane = count; lane < width; ++lane) points[lane] = points[0];  // never used, but addressed
        run_count = 0;
        for (Index lane = 0; lane < count; lane += runs[run_count++].length) {
            runs[run_count] = run_from(points, lane, count, 1);
        }
    }

    // Returns whether no run crosses from one vector of lanes to the next.
    bool stay_in_vectors() const {
        return std::all_of(runs, runs + run_count,
                           [](const Run& run) { return run.first % kFloats + run.length <= kFloats; });
    }
};

constexpr Index kAhead = 8;  // rows that are prefetched

// Copies runs of lanes: one load and one store for each run and element of depth. A store may write past its run: the
// next run or row overwrites that, and there is room for it after the last row.
template <class T>
void copy_runs(const GemmJob<T>& job, const PanelLanes& lanes, const Point* depth, Index count, const Strides& to,
               float* panel, Magnitudes& magnitudes) {
    Inside inside[kMostLanes];
    Index places[kMostLanes];
    for (Index i = 0; i < lanes.run_count; ++i) places[i] = to.of_lane(lanes.runs[i].first);
    for (Index k = 0; k < count; ++k) {
        if (k == 0 || depth[k].y != depth[k - 1].y || depth[k].x != depth[k - 1].x) {
            for (Index i = 0; i < lanes.run_count; ++i) inside[i] = inside_image(job, lanes.runs[i], depth[k]);
        }
        const T* from = job.dense + depth[k].offset;
        const T* ahead = job.dense + depth[smaller(k + kAhead, count - 1)].offset;
        float* row = panel + k * to.row;
        // Lanes after the last are multiplied too. Clear them: their memory may hold denormals, which are very slow.
        for (Index lane = lanes.count / kFloats * kFloats; lane < lanes.width; lane += kFloats) {
            store(Floats{}, row + to.of_lane(lane));
        }
        for (Index i = 0; i < lanes.run_count; ++i) {
            const Run& run = lanes.runs[i];
            const Floats some = load_between(from + run.start.offset, inside[i]);
            magnitudes.add(some);
            store(some, row + places[i]);
            __builtin_prefetch(ahead + run.start.offset);
        }
    }
}

// Runs of a block of depth. If it runs across two or four samples, each of them has runs of its own, `stride` apart.
struct DepthRuns {
    Run runs[kDepthBlock];
    Index count = 0, stride = 4;

    DepthRuns(const Point* depth, Index size) {
        while (stride > 1 && !(stride < size && depth[stride].offset == depth[0].offset + 1)) stride /= 2;
        for (Index series = 0; series < smaller(stride, size); ++series) {
            for (Index k = series; k < size; k += runs[count++].length * stride) {
                runs[count] = run_from(depth, k, size, stride);
            }
        }
    }
};

// Copies a run of depth for a vector of lanes from `lane` on: a square, transposed.
template <class T>
void transpose_run(const GemmJob<T>& job, const PanelLanes& lanes, Index lane, const Run& run, const Inside* inside,
                   Index step, float* panel, Magnitudes& magnitudes) {
    const T* from = job.dense + run.start.offset;
    Floats square[kFloats];
#pragma GCC unroll 16
    for (Index i = 0; i < kFloats; ++i) {
        const T* const row = from + lanes.points[lane + i].offset;
        square[i] = load_between(row, inside[i]);
        magnitudes.add(square[i]);
        __builtin_prefetch(row + kDepthBlock);  // the next block
    }
    transpose(square);
    for (Index k = 0; k < run.length; ++k) store(square[k], panel + k * step);
}

// All depth of a few lanes, then of the next: a lane is often a page of its own.
template <class T>
void transpose_runs(const GemmJob<T>& job, const PanelLanes& lanes, const Point* depth, Index count, const Strides& to,
                    float* panel, Magnitudes& magnitudes) {
    const DepthRuns all(depth, count);
    for (Index lane = 0; lane < lanes.width; lane += kFloats) {
        Inside inside[kFloats] = {};
        for (Index r = 0; r < all.count; ++r) {
            const Run& run = all.runs[r];
            for (Index i = 0; i < kFloats && (r == 0 || !run.is_placed_like(all.runs[r - 1])); ++i) {
                inside[i] = lane + i < lanes.count ? inside_image(job, run, lanes.points[lane + i]) : Inside{0, 0};
            }
            float* const first = panel + run.first * to.row + to.of_lane(lane);
            transpose_run(job, lanes, lane, run, inside, all.stride * to.row, first, magnitudes);
        }
    }
}

// Returns the panel's number of rows. Zeros follow the last element of depth, as kernels read several rows at once.
template <class T>
Index fill_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, const Strides& to, float* panel) {
    const Index count = smaller(kDepthBlock, job.dense_depth.size - block * kDepthBlock);
    Point depth[kDepthBlock];
    walk(job.dense_depth, block * kDepthBlock, count, depth);
    Magnitudes magnitudes;
    if (lanes.run_count * 4 <= lanes.count) {
        copy_runs(job, lanes, depth, count, to, panel, magnitudes);
    } else {
        transpose_runs(job, lanes, depth, count, to, panel, magnitudes);
    }
    const Index rows = pieces(count, 16) * 16;
    for (Index k = count; k < rows; ++k) {
        for (Index lane = 0; lane < lanes.width; lane += kFloats) store(Floats{}, panel + k * to.row + to.of_lane(lane));
    }
    if (lanes.is_checked && !magnitudes.are_finite()) *job.is_finite = false;
    return rows;
}

}  // namespace nmcompile::NMCOMPILE_ISA
