// Adds the products of a row of the sparse operand and a panel to the row's sums, as a compiled loop.
#pragma once

#include "gemm/kept_values.h"
#include "gemm/paired_values.h"

namespace nmcompile::NMCOMPILE_ISA {

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return std::bit_cast<Floats>(_mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(c)));
#elif defined(__FMA__)
    return std::bit_cast<Floats>(_mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// Broadcasts each of four values to all lanes of a vector, with one load per value.
struct LoadedValues : SingleValues {
    using Form = SingleValues;
    static constexpr auto add = multiply_add;
    const float* from;
    explicit LoadedValues(const float* from) : from(from) {}
    template <int kWhich>
    Floats get() const {
        return from[kWhich] - Floats{};
    }
};

#if defined(__AVX512F__)
// Broadcasts them with one load for the four, and permutations.
template <class F>
struct Permuted : F {
    using Form = F;
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
    // In assembly, as a template cannot ask for an instruction that the rest of the file does without.
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

// Adds the values that one row keeps of a block of depth, a multiple of four, to its sums of a tile. The sums stay in
// registers; each value meets a panel's row that the multiply-add reads as its memory operand: no shuffles.
template <class Four, int kVectors>
void add_row(const float* values, const std::uint8_t* places, Index kept, const float* panel, float* sums, bool first) {
    constexpr Index kWidth = kVectors * kFloats;
    Floats sum[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[v] = first ? Floats{} : load<Floats>(sums + v * kFloats);
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

template <class Four, int kVectors>
void add_rows(const KeptValues& kept, Index rows, Index values, const float* panel, float* sums, bool first) {
    for (Index row = 0; row < rows; ++row, sums += kVectors * kFloats) {
        const Index at = row * Four::kValues;
        add_row<Four, kVectors>(kept.values + at, kept.places + at, values, panel, sums, first);
    }
}

// Adds `rows` rows, whose kept values cover `fours` fours of a block, on a panel of `width` lanes.
template <class Four>
void add_rows(const KeptValues& kept, Index rows, Index fours, Index width, const float* panel, float* sums, bool first) {
    static constexpr decltype(&add_rows<Four, 1>) add[] = {add_rows<Four, 1>, add_rows<Four, 2>, add_rows<Four, 3>,
                                                           add_rows<Four, 4>, add_rows<Four, 5>, add_rows<Four, 6>,
                                                           add_rows<Four, 7>, add_rows<Four, 8>};
    static_assert(sizeof(add) == kMostVectors * sizeof(add[0]));
    constexpr Index kOfFour = 4 * Four::kValues / kDepthBlock;
    add[width / kFloats - 1](kept, rows, pieces(fours * kOfFour, 4) * 4, panel, sums, first);
}

}  // namespace nmcompile::NMCOMPILE_ISA
