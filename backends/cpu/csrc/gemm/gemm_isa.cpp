// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "gemm/gemm_isa.h"

#include <vector>

#include "gemm/row_code.h"
#include "gemm/row_sums.h"
#include "gemm/tile_output.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

// The lanes of a tile that share a panel, and their sums.
struct Column {
    PanelLanes from, to;
    float *panel, *sums;
};

// The values that a tile's rows keep of some depth.
struct Kept {
    KeptValues values;
    Index rows, fours;
    bool is_first;
};

template <class Form, class T>
Kept kept_by(const GemmJob<T>& job, const KeptValues& all, const GemmTile& tile, Index block, Index blocks) {
    const Index at = (block * job.rows + tile.first_row) * Form::kValues;
    const Index depth = smaller(blocks * kDepthBlock, job.dense_depth.size - block * kDepthBlock);
    return {{all.values + at, all.places + at}, tile.last_row - tile.first_row, pieces(depth, 4), block == 0};
}

template <class Four, class T>
void add_block(const GemmJob<T>& job, const Kept& kept, Index block, const std::vector<Column>& columns, float* floats) {
    for (const Column& column : columns) {
        Four::make_panel(job, column.from, block, column.panel, floats);
        add_rows<Four>(kept.values, kept.rows, kept.fours, column.from.width, column.panel, column.sums, kept.is_first);
    }
}

#if defined(__AVX512F__)
template <class Form, class T>
void make_panels(const GemmJob<T>& job, Index block, Index blocks, const std::vector<Column>& columns, float* floats) {
    for (const Column& column : columns) {
        for (Index i = 0; i < blocks; ++i) {
            float* const panel = column.panel + i * kFours * PanelCode<Form>::kPanelRows * column.from.width;
            PanelCode<Form>::make_panel(job, column.from, block + i, panel, floats);
        }
    }
}

// Prefetches the values of the next rows, which the processor cannot predict before these rows begin.
template <class Form>
void fetch_rows(const Kept& kept, Index row, Index stride) {
    constexpr Index kOfLine = 64 / sizeof(float), kKept = kCodeRows * Form::kValues;
    for (Index block = 0; block < pieces(kept.fours, kFours); ++block) {
        const Index at = row * Form::kValues + block * stride;
        for (Index i = 0; i < kKept; i += kOfLine) __builtin_prefetch(kept.values.values + at + i);
        for (Index i = 0; i < kKept; i += 64) __builtin_prefetch(kept.values.places + at + i);
    }
}

// Code that is written for some rows runs through all columns.
template <class Form>
void add_rows(RowCode<Form>& code, const Kept& kept, Index stride, const std::vector<Column>& columns) {
    const Index width = columns[0].from.width;
    const auto written = [&](Index row) {
        const Index rows = smaller(kCodeRows, kept.rows - row);
        return code.write(rows, kept.fours, width, kept.values.places + row * Form::kValues, stride);
    };
    auto next = written(0);
    for (Index row = 0; row < kept.rows; row += kCodeRows) {
        const auto these = next;
        if (row + kCodeRows < kept.rows) next = written(row + kCodeRows);
        fetch_rows<Form>(kept, row + kCodeRows, stride);
        for (const Column& column : columns) {
            float* const sums = column.sums + row * width;
            for (Index lane = 0; lane < column.from.count; lane += kFloats) {
                these.run(column.panel + lane, kept.values.values + row * Form::kValues, sums + lane, kept.is_first);
            }
        }
    }
}
#endif

// Room for a panel of floats, then for a panel and sums of each column; each is followed by room for one more vector.
constexpr Index kPanelFloats = kDepthBlock * kMostLanes + kFloats;
#if defined(__AVX512F__)
template <class Form>
constexpr Index kPanelRows = greater(Form::kPanelRows, RowCode<Form>::kPanelRows);
#else
template <class Form>
constexpr Index kPanelRows = Form::kPanelRows;
#endif
template <class Form>
constexpr Index kColumnFloats = kPanelRows<Form> * kMostLanes + kFloats;
Index sum_floats(Index rows) { return rows * kMostLanes + kFloats; }

template <class Form>
Index scratch_floats(Index rows, Index lanes) {
    return kPanelFloats + pieces(lanes, Form::kLanes) * (kColumnFloats<Form> + sum_floats(rows));
}

// Columns all have the same width, except the last.
template <class Form, class T>
std::vector<Column> columns_of(const GemmJob<T>& job, const GemmTile& tile, float* scratch) {
    const Index lanes = tile.last_lane - tile.first_lane;
    const Index width = pieces(pieces(lanes, pieces(lanes, Form::kLanes)), kFloats) * kFloats;
    std::vector<Column> columns;
    columns.reserve(pieces(lanes, width));
    for (Index lane = tile.first_lane; lane < tile.last_lane; lane += width) {
        const Index last = smaller(lane + width, tile.last_lane);
        float* const sums = scratch + kColumnFloats<Form>;
        const bool is_checked = tile.first_row == 0;  // other tiles of these lanes read the same
        const PanelLanes from(job.dense_lanes, lane, last, width, is_checked);
        columns.push_back({from, {job.output_lanes, lane, last, width, false}, scratch, sums});
        scratch = sums + sum_floats(tile.last_row - tile.first_row);
    }
    return columns;
}

template <class T, class Four>
void add_all(const GemmJob<T>& job, const KeptValues& all, const GemmTile& tile, const std::vector<Column>& columns,
             float* floats) {
    using Form = typename Four::Form;
    const Index blocks = pieces(job.dense_depth.size, kDepthBlock);
#if defined(__AVX512F__)
    static thread_local RowCode<Form> code;
    if (columns.size() > 1 && code.is_ready()) {
        for (Index block = 0; block < blocks; block += kCodeBlocks) {
            make_panels<Form>(job, block, smaller(kCodeBlocks, blocks - block), columns, floats);
            add_rows(code, kept_by<Form>(job, all, tile, block, kCodeBlocks), job.rows * Form::kValues, columns);
        }
        return;
    }
#endif
    for (Index block = 0; block < blocks; ++block) {
        add_block<Four>(job, kept_by<Form>(job, all, tile, block, 1), block, columns, floats);
    }
}

template <class T, class Four>
void multiply(const GemmJob<T>& job, const KeptValues& kept, const GemmTile& tile, float* scratch) {
    const std::vector<Column> columns = columns_of<typename Four::Form>(job, tile, scratch + kPanelFloats);
    add_all<T, Four>(job, kept, tile, columns, scratch);
    for (const Column& column : columns) write_output(job, column.to, tile.first_row, tile.last_row, column.sums);
}

template <class T, class Four>
GemmKernel<T> kernel() {
    using Form = typename Four::Form;
    Index panels = 1;
#if defined(__AVX512F__)
    if (RowCode<Form>::is_allowed()) panels = kCodeLanes / Form::kLanes;
#endif
    return {kFloats, Form::kLanes, panels, Form::kValues, pack<Form, T>, multiply<T, Four>, scratch_floats<Form>};
}

}  // namespace

template <class T>
GemmKernel<T> gemm_kernel() {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
        if (__builtin_cpu_supports("avx512bf16")) return kernel<T, PermutedPairs>();
    }
    // AMD's Zen 4 loads one vector per cycle, which the panel takes up; so permute there. Intel permutes on the port
    // that multiplies.
    if (__builtin_cpu_is("amd")) return kernel<T, PermutedValues>();
#endif
    return kernel<T, LoadedValues>();
}

template GemmKernel<float> gemm_kernel<float>();
template GemmKernel<BFloat16> gemm_kernel<BFloat16>();

}  // namespace nmcompile::NMCOMPILE_ISA
