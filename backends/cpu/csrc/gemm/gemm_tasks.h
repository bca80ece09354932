// Division of a product into tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/gemm_isa.h"
#include "machine/parallel.h"

namespace nmcompile {

// A task is a tile of so many lanes and rows; at the end of C it is smaller.
struct Tasks {
    std::int64_t lanes, rows, across, along;  // across: tiles along the lanes; along: tiles along the rows
    std::int64_t count() const { return across * along; }
};

// Cost of a task besides its products, in units of lanes times rows: to fill panels, per lane; to change from code to
// code, per row. And the factor by which products without code are slower. Measured on Emerald Rapids, the factor on
// Zen 4 and waiting on Sapphire Rapids.
constexpr double kFilling = 64, kWriting = 16, kWithoutCode = 1.2;
constexpr double kWaiting = 0.1;  // of a task: wait for the last of the threads when all have equal work
constexpr std::int64_t kMostRows = 2048;  // rows whose sums stay in a last-level cache
constexpr std::int64_t kFewestRows = 32;

inline double duration(const Tasks& tasks, std::int64_t panel_lanes, std::int64_t threads) {
    const auto lanes = static_cast<double>(tasks.lanes), rows = static_cast<double>(tasks.rows);
    const bool written = tasks.lanes > panel_lanes;
    const double one = lanes * rows * (written ? 1 : kWithoutCode) + kFilling * lanes + (written ? kWriting * rows : 0);
    return one * (static_cast<double>(pieces(tasks.count(), threads)) + (threads > 1 ? kWaiting : 0));
}

// Chooses tiles of about the same size: a narrow one would leave the multiplier waiting.
template <class T>
Tasks tasks_of(const GemmJob<T>& job, const GemmKernel<T>& kernel, std::int64_t threads) {
    const std::int64_t lanes = job.dense_lanes.size, vector = kernel.vector_lanes;
    Tasks best{};
    double shortest = 0;
    for (std::int64_t panels = kernel.most_panels; panels > 0; --panels) {
        const std::int64_t across = pieces(lanes, panels * kernel.panel_lanes);
        std::int64_t along = pieces(job.rows, kMostRows), rows;
        do {
            rows = pieces(pieces(job.rows, along), kPackedRows) * kPackedRows;
            const Tasks tasks{pieces(pieces(lanes, across), vector) * vector, rows, across, pieces(job.rows, rows)};
            const double time = duration(tasks, kernel.panel_lanes, threads);
            if (best.lanes == 0 || time < shortest) best = tasks, shortest = time;
            along *= 2;
        } while (threads > 1 && rows > kFewestRows);
    }
    return best;
}

}  // namespace nmcompile
