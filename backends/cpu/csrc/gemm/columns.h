// The columns of a tile, a panel wide each, and the room for their panels and sums.
#pragma once

#include <vector>

#include "gemm/paired_values.h"

namespace nmcompile::NMCOMPILE_ISA {

// The lanes of a tile that share a panel, and their sums.
struct Column {
    PanelLanes from, to;
    float *panel, *sums;
};

// Floats of one column's panel and sums for so many rows. Each is followed by room for one more vector.
struct ColumnRoom {
    Index panel_rows, sum_rows;
    Index panel() const { return panel_rows * kMostLanes + kFloats; }
    Index sums() const { return sum_rows * kMostLanes + kFloats; }
    Index all() const { return panel() + sums(); }
};

// Columns all have the same width; the last may have fewer lanes.
template <class Form, class T>
std::vector<Column> columns_of(const GemmJob<T>& job, const GemmTile& tile, const ColumnRoom& room, float* scratch) {
    const Index lanes = tile.last_lane - tile.first_lane;
    const Index width = pieces(pieces(lanes, pieces(lanes, Form::kLanes)), kFloats) * kFloats;
    std::vector<Column> columns;
    columns.reserve(pieces(lanes, width));
    for (Index lane = tile.first_lane; lane < tile.last_lane; lane += width, scratch += room.all()) {
        const Index last = smaller(lane + width, tile.last_lane);
        const bool is_checked = tile.first_row == 0;  // other tiles of these lanes read the same
        const PanelLanes from(job.dense_lanes, lane, last, width, is_checked);
        columns.push_back({from, {job.output_lanes, lane, last, width, false}, scratch, scratch + room.panel()});
    }
    return columns;
}

// The values that rows from `row` on keep of `blocks` blocks of depth. The values of the next block are `stride` further.
struct Kept {
    KeptValues values;
    Index depth, stride;
    bool is_first;
};

template <class Form, class T>
Kept kept_by(const GemmJob<T>& job, const KeptValues& all, Index row, Index block, Index blocks) {
    const Index at = (block * job.rows + row) * Form::kValues;
    const Index depth = smaller(blocks * kDepthBlock, job.dense_depth.size - block * kDepthBlock);
    return {{all.values + at, all.places + at}, depth, job.rows * Form::kValues, block == 0};
}

}  // namespace nmcompile::NMCOMPILE_ISA
