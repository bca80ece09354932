// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "gemm/gemm_isa.h"

#include <vector>

#include "gemm/coded_tile.h"
#include "gemm/columns.h"
#include "gemm/row_sums.h"
#include "gemm/tile_output.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

constexpr Index kPanelFloats = kDepthBlock * kMostLanes + kFloats;

#if defined(__AVX512F__)
template <class Form>
RowCode<Form>& code_of_thread() {
    static thread_local RowCode<Form> code;
    return code;
}

// Returns whether a tile of so many lanes runs written code: it takes more than one column to repay the writing.
template <class Form>
bool is_coded(Index lanes) {
    return lanes > Form::kLanes && code_of_thread<Form>().is_ready();
}
#endif

template <class Form>
ColumnRoom room_of(Index rows, [[maybe_unused]] Index lanes, [[maybe_unused]] Index depth) {
#if defined(__AVX512F__)
    if (is_coded<Form>(lanes)) return coded_room<Form>(rows, depth, pieces(lanes, Form::kLanes));
#endif
    return {Form::kPanelRows, rows};
}

// A panel of floats comes first.
template <class Form>
Index scratch_floats(Index rows, Index lanes, Index depth) {
    return kPanelFloats + pieces(lanes, Form::kLanes) * room_of<Form>(rows, lanes, depth).all();
}

template <class Four, class T>
void multiply_by_loops(const GemmJob<T>& job, const KeptValues& all, const GemmTile& tile, const Column& column,
                       float* floats) {
    using Form = typename Four::Form;
    const Index rows = tile.last_row - tile.first_row, width = column.from.width;
    for (Index block = 0; block < pieces(job.dense_depth.size, kDepthBlock); ++block) {
        const Kept kept = kept_by<Form>(job, all, tile.first_row, block, 1);
        Four::make_panel(job, column.from, block, column.panel, floats);
        add_rows<Four>(kept.values, rows, pieces(kept.depth, 4), width, column.panel, column.sums, kept.is_first);
    }
    write_output(job, column.to, tile.first_row, tile.last_row, column.sums, Strides::side_by_side(width));
}

template <class T, class Four>
void multiply(const GemmJob<T>& job, const KeptValues& kept, const GemmTile& tile, float* scratch) {
    using Form = typename Four::Form;
    const Index rows = tile.last_row - tile.first_row, lanes = tile.last_lane - tile.first_lane;
    const ColumnRoom room = room_of<Form>(rows, lanes, job.dense_depth.size);
    const std::vector<Column> columns = columns_of<Form>(job, tile, room, scratch + kPanelFloats);
#if defined(__AVX512F__)
    if (is_coded<Form>(lanes)) {
        return CodedTile<Form, T>(job, kept, tile, columns, code_of_thread<Form>()).multiply(scratch);
    }
#endif
    for (const Column& column : columns) multiply_by_loops<Four>(job, kept, tile, column, scratch);
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
