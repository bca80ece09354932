// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "gemm_isa.h"

#include "dense_panel.h"
#include "kept_values.h"
#include "paired_values.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return std::bit_cast<Floats>(_mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(c)));
#elif defined(__FMA__)
    return std::bit_cast<Floats>(_mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// Four values, each of them in all lanes of a vector: a load for each.
struct LoadedValues : SingleValues {
    static constexpr auto add = multiply_add;
    const float* from;
    explicit LoadedValues(const float* from) : from(from) {}
    template <int kWhich>
    Floats get() const {
        return from[kWhich] - Floats{};
    }
};

#if defined(__AVX512F__)
// One load for the four, and permutations.
template <class Form>
struct Permuted : Form {
    __m512 values;
    explicit Permuted(const float* from) : values(_mm512_broadcast_f32x4(_mm_loadu_ps(from))) {}
    template <int kWhich>
    Floats get() const {
        return std::bit_cast<Floats>(_mm512_permute_ps(values, kWhich * 0x55));
    }
};

struct PermutedValues : Permuted<SingleValues> {
    using Permuted::Permuted;
    static constexpr auto add = multiply_add;
};

struct PermutedPairs : Permuted<PairedValues> {
    using Permuted::Permuted;
    // In assembly, as a template cannot ask for an instruction that the rest of the file goes without.
    static Floats add(const Floats& pair, const Floats& row, Floats sum) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pair), "vm"(row));
        return sum;
    }
};
#endif

template <class Four, int kVectors>
[[gnu::always_inline]] inline void add_value(const Floats& value, const float* row, Floats* sum) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[v] = Four::add(value, load<Floats>(row + v * kFloats), sum[v]);
}

// Adds what one row keeps of a block of depth, a multiple of four values, to its sums of a tile. The sums stay in
// registers; each value meets a panel's row that the multiply-add reads as its memory operand: no shuffles.
template <class Four, int kVectors>
void add_row(const float* values, const std::uint8_t* places, Index kept, const float* panel, float* sums, bool fresh) {
    constexpr Index kWidth = kVectors * kFloats;
    Floats sum[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[v] = fresh ? Floats{} : load<Floats>(sums + v * kFloats);
    for (Index i = 0; i < kept; i += 4) {
        const Four four(values + i);
        add_value<Four, kVectors>(four.template get<0>(), panel + places[i] * kWidth, sum);
        add_value<Four, kVectors>(four.template get<1>(), panel + places[i + 1] * kWidth, sum);
        add_value<Four, kVectors>(four.template get<2>(), panel + places[i + 2] * kWidth, sum);
        add_value<Four, kVectors>(four.template get<3>(), panel + places[i + 3] * kWidth, sum);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(sum[v], sums + v * kFloats);
}

template <class T, class Four, int kVectors>
void add_block(const GemmJob<T>& job, const KeptValues& kept, Index block, const GemmTile& tile, const float* panel,
               float* sums) {
    constexpr Index kDepthOfFour = 4 * kDepthBlock / Four::kValues;
    const Index count = smaller(kDepthBlock, job.dense_depth.size - block * kDepthBlock);
    const Index values = (count + kDepthOfFour - 1) / kDepthOfFour * 4;
    for (Index row = tile.first_row; row < tile.last_row; ++row, sums += kVectors * kFloats) {
        const Index at = (block * job.rows + row) * Four::kValues;
        add_row<Four, kVectors>(kept.values + at, kept.places + at, values, panel, sums, block == 0);
    }
}

template <class T>
void write_row_runs(const GemmJob<T>& job, const TileOfLanes& to, Index first_row, Index last_row, const float* sums) {
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

// Rows lie side by side in the output.
template <class T>
void write_transposed(const GemmJob<T>& job, const TileOfLanes& to, Index first_row, Index last_row, const float* sums) {
    Index row = first_row;
    for (; row + kFloats <= last_row; row += kFloats) {
        const Floats bias = job.bias ? Memory<T>::read(job.bias + row) : Floats{};
        for (Index lane = 0; lane < to.count; lane += kFloats) {
            Floats square[kFloats];
            for (Index r = 0; r < kFloats; ++r) square[r] = load<Floats>(sums + (row - first_row + r) * to.width + lane);
            transpose(square);
            for (Index i = 0; i < smaller(kFloats, to.count - lane); ++i) {
                Memory<T>::write(square[i] + bias, job.output + to.points[lane + i].offset + row);
            }
        }
    }
    write_row_runs(job, to, row, last_row, sums + (row - first_row) * to.width);
}

// A panel, what the form makes of it, and the sums; room behind for a store, or a load, that goes beyond.
constexpr Index kPanelFloats = kDepthBlock * kTileLanes + kTileLanes;

template <class Form>
Index scratch_floats(Index rows) {
    return kPanelFloats + Form::kOwnRows * kTileLanes + rows * kTileLanes + kFloats;
}

template <class T, class Four>
void multiply(const GemmJob<T>& job, const KeptValues& kept, const GemmTile& tile, float* scratch) {
    static constexpr decltype(&add_block<T, Four, 1>) add_blocks[] = {
        add_block<T, Four, 1>, add_block<T, Four, 2>, add_block<T, Four, 3>, add_block<T, Four, 4>,
        add_block<T, Four, 5>, add_block<T, Four, 6>, add_block<T, Four, 7>, add_block<T, Four, 8>};
    static_assert(sizeof(add_blocks) == kTileVectors * sizeof(add_blocks[0]));
    float *panel = scratch, *own = panel + kPanelFloats, *sums = own + Four::kOwnRows * kTileLanes;
    const TileOfLanes from(job.dense_lanes, tile.first_lane, tile.last_lane);
    const TileOfLanes to(job.output_lanes, tile.first_lane, tile.last_lane);
    const auto add = add_blocks[from.width / kFloats - 1];
    for (Index block = 0; block * kDepthBlock < job.dense_depth.size; ++block) {
        const Index count = fill_panel(job, from, block, panel);
        add(job, kept, block, tile, Four::panel_of(panel, count, from.width, own), sums);
    }
    (job.output_row == 1 ? write_transposed<T> : write_row_runs<T>)(job, to, tile.first_row, tile.last_row, sums);
}

template <class T, class Four>
GemmKernel<T> kernel() {
    return {kFloats, Four::kLanes, Four::kValues, pack<Four, T>, multiply<T, Four>, scratch_floats<Four>};
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
