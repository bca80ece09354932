// Codes by the scaling of a layer: four vectors of sums at once, and whether the scaling decides each of them.
#pragma once

#include <array>

#include "network/network_isa.h"
#include "network/widen.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kFour = 4 * kFloats;
using ManyBytes = Vector<std::uint8_t, kFour>;
using Halves = Vector<std::uint16_t, 2 * kFloats>;

struct FourFloats {
    Floats of[4];
};
struct FourIntegers {
    Integers of[4];
};

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return std::bit_cast<Floats>(
        _mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(c)));
#elif defined(__FMA__)
    return std::bit_cast<Floats>(
        _mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// Returns the upper halves, clamped to bytes, one vector after the other.
#if defined(__AVX512VBMI__)
// Bytes are in the order of the instructions: in each 16, a pair of vectors gives eight, in turns.
inline ManyBytes upper_bytes_in_turns(const FourIntegers& x) {
    const auto pair = [](Integers first, Integers second) {
        const __m512i lower = _mm512_srli_epi32(std::bit_cast<__m512i>(first), 16);
        return _mm512_mask_blend_epi16(0xAAAAAAAA, lower, std::bit_cast<__m512i>(second));
    };
    return std::bit_cast<ManyBytes>(_mm512_packus_epi16(pair(x.of[0], x.of[1]), pair(x.of[2], x.of[3])));
}

inline ManyBytes upper_bytes(const FourIntegers& x) {
    alignas(64) static constexpr auto order = [] {
        std::array<std::uint8_t, 64> from{};
        for (int i = 0; i < 64; ++i) {
            const int vector = i / 16, element = i % 16;
            from[i] = static_cast<std::uint8_t>(element / 4 * 16 + vector / 2 * 8 + element % 4 * 2 + vector % 2);
        }
        return from;
    }();
    return std::bit_cast<ManyBytes>(_mm512_permutexvar_epi8(
        _mm512_load_si512(order.data()), std::bit_cast<__m512i>(upper_bytes_in_turns(x))));
}
#elif defined(__AVX2__)
inline ManyBytes upper_bytes(const FourIntegers& x) {
    const auto pair = [](Integers first, Integers second) {
        return _mm256_packs_epi32(std::bit_cast<__m256i>(first >> 16), std::bit_cast<__m256i>(second >> 16));
    };
    const __m256i bytes = _mm256_packus_epi16(pair(x.of[0], x.of[1]), pair(x.of[2], x.of[3]));
    return std::bit_cast<ManyBytes>(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
#else
inline ManyBytes upper_bytes(const FourIntegers& x) {
    ManyBytes result;
    for (int i = 0; i < kFour; ++i) {
        const std::int32_t code = x.of[i / kFloats][i % kFloats] >> 16;
        result[i] = static_cast<std::uint8_t>(code < 0 ? 0 : code > 255 ? 255 : code);
    }
    return result;
}
#endif

// Codes in the fixed point of the scaling, and the lowest of their lower halves.
class FixedPoint {
public:
    static bool fits(const LayerJob& job) { return job.scaling->margin != 0; }

    explicit FixedPoint(const LayerJob& job)
        : job_(job),
          doubt_(Halves{} + static_cast<std::uint16_t>(2 * job.scaling->margin)),
          most_(ManyBytes{} + static_cast<std::uint8_t>(job.grid.high - job.grid.low)) {}

    Integers of(Integers n, Floats scale, Floats offset) {
        const Floats x = multiply_add(__builtin_convertvector(n, Floats), scale, offset);
        const Integers code = __builtin_convertvector(x, Integers);
#if defined(__AVX512BW__)
        const auto lowest = std::bit_cast<__m512i>(lowest_);
        lowest_ = std::bit_cast<Halves>(
            _mm512_mask_min_epu16(lowest, 0x55555555, lowest, std::bit_cast<__m512i>(code)));
#else
        const auto lower = std::bit_cast<Halves>(code | (Integers{} - 0x10000));
        lowest_ = lower < lowest_ ? lower : lowest_;
#endif
        return code;
    }

    // Returns whether the scaling decides these codes, which are all since the last call, and mends those that need it.
    bool decides(FourIntegers& codes) {
        const Halves lowest = lowest_;
        lowest_ = ~Halves{};
#if defined(__AVX512BW__)
        const bool is_sure = _mm512_cmple_epu16_mask(std::bit_cast<__m512i>(lowest), std::bit_cast<__m512i>(doubt_)) == 0;
#else
        const bool is_sure = !any(lowest <= doubt_);
#endif
        return is_sure || decides_by_size(codes);
    }

    ManyBytes clamped(ManyBytes codes) const { return codes < most_ ? codes : most_; }

private:
    // Takes back the margin of the largest code. Next to the lowest code, and to one that is clamped, both sides become
    // the same.
    bool decides_by_size(FourIntegers& codes) const {
        const Scaling& scaling = *job_.scaling;
        Integers doubts = {};
        for (Integers& code : codes.of) {
            code -= scaling.margin;
            const Integers nearest = (code + 0x8000) >> 16, away = code - (nearest << 16);
            const Floats steps = __builtin_convertvector(magnitude(nearest + job_.grid.low), Floats);
            const Floats margin = scaling.least + scaling.growth * steps;
            const Integers is_near = __builtin_convertvector(magnitude(away), Floats) <= margin;
            doubts |= is_near & (nearest >= 1) & (nearest <= job_.grid.high - job_.grid.low);
        }
        return !any(doubts);
    }

    static Integers magnitude(Integers x) { return x < 0 ? -x : x; }

    const LayerJob& job_;
    Halves doubt_;
    ManyBytes most_;
    Halves lowest_ = ~Halves{};
};

}  // namespace nmcompile::NMCOMPILE_ISA
