// Vectors of floats, and the arithmetic that the matrix kernels share.
#pragma once

#include "lanes.h"

namespace nmcompile::NMCOMPILE_ISA {

using Index = std::int64_t;
using Float = Lanes<float>;
using Floats = Float::Reals;
using FloatInts = Float::Ints;
constexpr int kFloats = Float::kCount;

inline Index smaller(Index a, Index b) { return a < b ? a : b; }
inline Index greater(Index a, Index b) { return a > b ? a : b; }

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return std::bit_cast<Floats>(_mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(c)));
#elif defined(__FMA__)
    return std::bit_cast<Floats>(_mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

}  // namespace nmcompile::NMCOMPILE_ISA
