// bfloat16 in pairs, as AVX512_BF16 multiplies and adds them: what each four keeps is one pair, and a panel has a row for
// each of the six pairs of places in a four. It is larger than one of floats by half, and is read half as often.
#pragma once

#include "kept_values.h"

#if defined(__AVX512F__)
namespace nmcompile::NMCOMPILE_ISA {

constexpr int kPairs = 6;

struct PairedValues {
    static constexpr Index kValues = kDepthBlock / 4;
    static constexpr Index kLanes = 5 * kFloats;  // so that 96 rows of a panel stay in a cache of the first level
    static constexpr Index kOwnRows = kPairs * kValues;

    static bool pack_row(const float* row, const KeptValues& kept, Index at) {
        alignas(64) float values[kDepthBlock / 2];
        std::uint8_t places[kDepthBlock / 2];
        if (!pack_singles(row, {values, places}, 0)) return false;
        for (Index i = 0; i < kValues; i += 8) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept.values + at + i), joined(values + 2 * i));
        }
        for (Index i = 0; i < kValues; ++i) {
            const int pair = pair_of(places[2 * i] & 3, places[2 * i + 1] & 3);
            kept.places[at + i] = static_cast<std::uint8_t>(kPairs * i + pair);
        }
        return true;
    }

    // From a panel of floats with `count` rows, a multiple of four.
    static const float* panel_of(const float* panel, Index count, Index width, float* own) {
        float* to = own;
        for (Index k = 0; k < count; k += 4, panel += 4 * width, to += kPairs * width) {
            for (Index lane = 0; lane < width; lane += kFloats) {
                __m512i x[4];
                for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(panel + i * width + lane);
                for (int i = 0, pair = 0; i < 3; ++i) {
                    const __m512i low = _mm512_srli_epi32(x[i], 16);
                    for (int j = i + 1; j < 4; ++j, ++pair) {
                        _mm512_storeu_si512(to + pair * width + lane, _mm512_or_si512(low, x[j]));
                    }
                }
            }
        }
        return own;
    }

   private:
    // Sixteen floats as eight pairs, the first of each in the lower half.
    static __m256i joined(const float* values) {
        const __m512i x = _mm512_load_si512(values);
        const __m512i low = _mm512_and_si512(_mm512_srli_epi64(x, 16), _mm512_set1_epi64(0xFFFF));
        const __m512i high = _mm512_and_si512(_mm512_srli_epi64(x, 32), _mm512_set1_epi64(0xFFFF0000));
        return _mm512_cvtepi64_epi32(_mm512_or_si512(low, high));
    }

    // (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)
    static int pair_of(int first, int second) { return second - 1 + (first > 0) + (first == 1) + 2 * (first == 2); }
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
