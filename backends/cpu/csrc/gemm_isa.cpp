// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "gemm_isa.h"

#include <vector>

#include "row_code.h"
#include "row_sums.h"
#include "tile_output.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

// Lanes of a tile that share a panel, and their sums.
struct Column {
    PanelLanes from, to;
    float *panel, *sums;
};

// A block of depth, and what the rows of a tile keep of it.
struct Block {
    Index index, rows, fours;
    KeptValues kept;

    bool is_first() const { return index == 0; }
};

template <class Form, class T>
Block block_of(const GemmJob<T>& job, const KeptValues& kept, const GemmTile& tile, Index index) {
    const Index at = (index * job.rows + tile.first_row) * Form::kValues;
    const Index depth = smaller(kDepthBlock, job.dense_depth.size - index * kDepthBlock);
    return {index, tile.last_row - tile.first_row, pieces(depth, 4), {kept.values + at, kept.places + at}};
}

#if defined(__AVX512F__)
// What is written for some rows runs through all columns.
template <class Form>
void add_block(RowCode<Form>& code, const Block& block, const std::vector<Column>& columns) {
    const Index width = columns[0].from.width;
    for (Index row = 0; row < block.rows; row += kCodeRows) {
        const Index at = row * Form::kValues, rows = smaller(kCodeRows, block.rows - row);
        code.write(static_cast<int>(rows), static_cast<int>(block.fours), width, block.kept.places + at);
        for (const Column& column : columns) {
            float* const sums = column.sums + row * width;
            for (Index lane = 0; lane < column.from.count; lane += kFloats) {
                code.run(column.panel + lane, block.kept.values + at, sums + lane, block.is_first());
            }
        }
    }
}
#endif

template <class Four>
void add_block(const Block& block, const std::vector<Column>& columns) {
#if defined(__AVX512F__)
    static thread_local RowCode<typename Four::Form> code;
    if (columns.size() > 1 && code.is_ready()) return add_block(code, block, columns);
#endif
    for (const Column& column : columns) {
        add_rows<Four>(block.kept, block.rows, block.fours, column.from.width, column.panel, column.sums, block.is_first());
    }
}

// A panel of floats to begin with, then a panel and sums for each column; behind each of them, room for a vector.
constexpr Index kPanelFloats = kDepthBlock * kMostLanes + kFloats;
template <class Form>
constexpr Index kColumnFloats = Form::kPanelRows * kMostLanes + kFloats;
Index sum_floats(Index rows) { return rows * kMostLanes + kFloats; }

template <class Form>
Index scratch_floats(Index rows, Index lanes) {
    return kPanelFloats + pieces(lanes, Form::kLanes) * (kColumnFloats<Form> + sum_floats(rows));
}

// Columns of the same width but for the last.
template <class Form, class T>
std::vector<Column> columns_of(const GemmJob<T>& job, const GemmTile& tile, float* scratch) {
    const Index lanes = tile.last_lane - tile.first_lane;
    const Index width = pieces(pieces(lanes, pieces(lanes, Form::kLanes)), kFloats) * kFloats;
    std::vector<Column> columns;
    columns.reserve(pieces(lanes, width));
    for (Index lane = tile.first_lane; lane < tile.last_lane; lane += width) {
        const Index last = smaller(lane + width, tile.last_lane);
        float* const sums = scratch + kColumnFloats<Form>;
        columns.push_back({{job.dense_lanes, lane, last, width}, {job.output_lanes, lane, last, width}, scratch, sums});
        scratch = sums + sum_floats(tile.last_row - tile.first_row);
    }
    return columns;
}

template <class T, class Four>
void multiply(const GemmJob<T>& job, const KeptValues& kept, const GemmTile& tile, float* scratch) {
    const std::vector<Column> columns = columns_of<Four>(job, tile, scratch + kPanelFloats);
    for (Index index = 0; index * kDepthBlock < job.dense_depth.size; ++index) {
        for (const Column& column : columns) Four::make_panel(job, column.from, index, column.panel, scratch);
        add_block<Four>(block_of<Four>(job, kept, tile, index), columns);
    }
    for (const Column& column : columns) write_output(job, column.to, tile.first_row, tile.last_row, column.sums);
}

template <class T, class Four>
GemmKernel<T> kernel() {
    Index panels = 1;
#if defined(__AVX512F__)
    if (RowCode<typename Four::Form>::is_allowed()) panels = kCodePanels;
#endif
    return {kFloats, Four::kLanes, panels, Four::kValues, pack<Four, T>, multiply<T, Four>, scratch_floats<Four>};
}

}  // namespace

template <class T>
GemmKernel<T> gemm_kernel() {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
        if (__builtin_cpu_supports("avx512bf16")) return kernel<T, PermutedPairs>();
    }
    // AMD's Zen 4 loads one vector in a cycle, and the panel needs them all; Intel permutes where it multiplies.
    if (__builtin_cpu_is("amd")) return kernel<T, PermutedValues>();
#endif
    return kernel<T, LoadedValues>();
}

template GemmKernel<float> gemm_kernel<float>();
template GemmKernel<BFloat16> gemm_kernel<BFloat16>();

}  // namespace nmcompile::NMCOMPILE_ISA
