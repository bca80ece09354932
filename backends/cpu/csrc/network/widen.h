// Vectors of bytes to and from vectors of 32-bit integers. GCC 12 compiles __builtin_convertvector to moves of single
// bytes.
#pragma once

#include <type_traits>

#include "machine/lanes.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kFloats = NMCOMPILE_VECTOR_BYTES / 4;
using Floats = Vector<float, kFloats>;
using Integers = Vector<std::int32_t, kFloats>;
using FewBytes = Vector<std::uint8_t, kFloats>;

template <class Byte>
inline Integers widened(const void* bytes) {
    [[maybe_unused]] constexpr bool is_signed = std::is_signed_v<Byte>;
#if defined(__AVX512F__)
    const __m128i x = std::bit_cast<__m128i>(load<FewBytes>(bytes));
    return std::bit_cast<Integers>(is_signed ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#elif defined(__AVX2__)
    const __m128i x = _mm_loadl_epi64(static_cast<const __m128i*>(bytes));
    return std::bit_cast<Integers>(is_signed ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#else
    return __builtin_convertvector(load<Vector<Byte, kFloats>>(bytes), Integers);
#endif
}

// Returns the lowest byte of each integer.
inline FewBytes narrowed(Integers x) {
#if defined(__AVX512F__)
    return std::bit_cast<FewBytes>(_mm512_cvtepi32_epi8(std::bit_cast<__m512i>(x)));
#elif defined(__AVX2__)
    const __m256i firsts = _mm256_set1_epi32(0x0C080400);
    const __m256i lanes = _mm256_shuffle_epi8(std::bit_cast<__m256i>(x), firsts);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return load<FewBytes>(&both);
#else
    return __builtin_convertvector(x, FewBytes);
#endif
}

// A sum with it has no place for a fraction, and is rounded to even; its lower bits are the integer.
constexpr float kRound = 3 << 22;
constexpr std::int32_t kRoundBits = std::bit_cast<std::int32_t>(kRound);

// Returns whether the magnitude of an element is above a limit.
inline bool is_any_beyond(Floats x, float limit) {
    const auto magnitude = std::bit_cast<Floats>(std::bit_cast<Integers>(x) & 0x7FFFFFFF);
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(std::bit_cast<__m512>(magnitude), _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
    return any(magnitude > Floats{} + limit);
#endif
}

}  // namespace nmcompile::NMCOMPILE_ISA
