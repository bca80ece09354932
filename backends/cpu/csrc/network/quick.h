// Codes by the scaling of a layer: four vectors of sums at once, and whether each of their fractions decides.
#pragma once

#include "network/network_isa.h"
#include "network/widen.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kFour = 4 * kFloats;
using ManyBytes = Vector<std::uint8_t, kFour>;

struct FourFloats {
    Floats of[4];
};
struct FourIntegers {
    Integers of[4];
};

// Returns the integers one vector after the other, each clamped to a byte; `in_lanes` leaves them in the order of the
// instructions: lanes of 16 bytes of which a lane of each vector gives four.
#if defined(__AVX512BW__)
inline ManyBytes bytes_in_lanes(const FourIntegers& x) {
    const __m512i first = _mm512_packs_epi32(std::bit_cast<__m512i>(x.of[0]), std::bit_cast<__m512i>(x.of[1]));
    const __m512i second = _mm512_packs_epi32(std::bit_cast<__m512i>(x.of[2]), std::bit_cast<__m512i>(x.of[3]));
    return std::bit_cast<ManyBytes>(_mm512_packus_epi16(first, second));
}

inline ManyBytes bytes(const FourIntegers& x) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return std::bit_cast<ManyBytes>(_mm512_permutexvar_epi32(order, std::bit_cast<__m512i>(bytes_in_lanes(x))));
}
#elif defined(__AVX2__)
inline ManyBytes bytes(const FourIntegers& x) {
    const __m256i first = _mm256_packs_epi32(std::bit_cast<__m256i>(x.of[0]), std::bit_cast<__m256i>(x.of[1]));
    const __m256i second = _mm256_packs_epi32(std::bit_cast<__m256i>(x.of[2]), std::bit_cast<__m256i>(x.of[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return std::bit_cast<ManyBytes>(_mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order));
}
#else
inline ManyBytes bytes(const FourIntegers& x) {
    ManyBytes result;
    for (int i = 0; i < kFour; ++i) {
        const std::int32_t integer = x.of[i / kFloats][i % kFloats];
        result[i] = static_cast<std::uint8_t>(integer < 0 ? 0 : integer > 255 ? 255 : integer);
    }
    return result;
}
#endif

// The nearest integers of n * scale + offset, and the farthest of their fractions from the integer.
class Quick {
public:
    static bool is_there(const LayerJob& job) { return job.scaling->limit > 0; }

    explicit Quick(const LayerJob& job)
        : limit_(job.scaling->limit), most_(ManyBytes{} + static_cast<std::uint8_t>(job.grid.high - job.grid.low)) {}

    // Returns the nearest integers of n * scale + offset, and notes their fractions.
    Integers nearest(Integers n, Floats scale, Floats offset) {
#if defined(__AVX512DQ__)
        const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(std::bit_cast<__m512i>(n)), std::bit_cast<__m512>(scale),
                                         std::bit_cast<__m512>(offset));
        constexpr int kLargerMagnitude = 0b1011;
        farthest_ = std::bit_cast<Floats>(
            _mm512_range_ps(std::bit_cast<__m512>(farthest_), _mm512_reduce_ps(x, 0), kLargerMagnitude));
        return std::bit_cast<Integers>(_mm512_cvtps_epi32(x));
#else
        const Floats x = __builtin_convertvector(n, Floats) * scale + offset, rounded = x + kRound;
        const Floats fraction = x - (rounded - kRound);
        farthest_ = larger(farthest_, std::bit_cast<Floats>(std::bit_cast<Integers>(fraction) & 0x7FFFFFFF));
        return std::bit_cast<Integers>(rounded) - kRoundBits;
#endif
    }

    ManyBytes clamped(ManyBytes codes) const { return codes < most_ ? codes : most_; }

    // Returns whether all fractions since the last call decide.
    bool is_sure() {
        const Floats farthest = farthest_;
        farthest_ = Floats{};
        return !is_any_beyond(farthest, limit_);
    }

private:
    float limit_;
    ManyBytes most_;
    Floats farthest_ = {};
};

}  // namespace nmcompile::NMCOMPILE_ISA
