// bfloat16 in pairs, as AVX512_BF16 multiplies and adds them: each four keeps one pair, and a panel has a row for each
// of the six pairs of places in a four. The panel is half as large again as one of floats, and is read half as often.
#pragma once

#include "gemm/kept_values.h"

#if defined(__AVX512F__)
namespace nmcompile::NMCOMPILE_ISA {

struct PairedValues {
    static constexpr Index kValues = kDepthBlock / 4;
    static constexpr Index kPanelRows = kPairs * kValues;
    static constexpr Index kLanes = 5 * kFloats;  // a panel then stays in a first-level cache

    static bool pack_row(const float* row, const KeptValues& kept, Index at) {
        bool excess = false;
        for (std::uint32_t four = 0; four < kValues; four += 4) {
            const KeptOfSixteen some(row + 4 * four);
            excess |= some.excess();
            _mm_storeu_si128(reinterpret_cast<__m128i*>(kept.values + at + four), joined(some.values));
            const std::uint32_t pairs = (some.low.pairs | std::uint32_t{some.high.pairs} << 16) +
                                        kPairs * (four * 0x01010101u + 0x02020000u);
            std::memcpy(kept.places + at + four, &pairs, sizeof(pairs));
        }
        return !excess;
    }

    // `floats` is room for the panel of single values.
    template <class T>
    static void make_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, float* panel, float* floats) {
        const Index count = fill_panel(job, lanes, block, Strides::side_by_side(lanes.width), floats);
        for (Index k = 0; k < count; k += 4, floats += 4 * lanes.width, panel += kPairs * lanes.width) {
            for (Index lane = 0; lane < lanes.width; lane += kFloats) pair_rows(floats + lane, lanes.width, panel + lane);
        }
    }

    static void join_rows(const float* low, const float* high, float* to) {
        const __m512i first = _mm512_srli_epi32(_mm512_loadu_si512(low), 16);
        _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_loadu_si512(high)));
    }

   private:
    static void pair_rows(const float* from, Index width, float* to) {
        __m512i x[4];
        for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(from + i * width);
        for (int i = 0; i < 3; ++i) {
            const __m512i low = _mm512_srli_epi32(x[i], 16);
            for (int j = i + 1; j < 4; ++j, to += width) _mm512_storeu_si512(to, _mm512_or_si512(low, x[j]));
        }
    }

    // Packs eight floats as four pairs, the first of each in the lower half.
    static __m128i joined(__m256 values) {
        const __m256i x = _mm256_castps_si256(values);
        const __m256i low = _mm256_and_si256(_mm256_srli_epi64(x, 16), _mm256_set1_epi64x(0xFFFF));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi64(x, 32), _mm256_set1_epi64x(0xFFFF0000));
        return _mm256_cvtepi64_epi32(_mm256_or_si256(low, high));
    }
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
