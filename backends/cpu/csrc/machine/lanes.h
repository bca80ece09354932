// Vectors of GCC and Clang, as wide as the instruction set that this is compiled for. They have the operators of their
// elements, and a comparison yields a mask of ones and zeros for `?:`. Everything is in a namespace of the instruction
// set, so the linker never replaces the code of one set with another's.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "machine/storage.h"

#ifndef NMCOMPILE_ISA
#error "set NMCOMPILE_ISA to the name of the instruction set that this file is compiled for"
#endif

#if defined(__AVX512F__)
#define NMCOMPILE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NMCOMPILE_VECTOR_BYTES 32
#else
#define NMCOMPILE_VECTOR_BYTES 16
#endif

namespace nmcompile::NMCOMPILE_ISA {

template <class Element, int Count>
struct VectorOf {
    typedef Element Type __attribute__((vector_size(sizeof(Element) * Count)));
};
template <class Element, int Count>
using Vector = typename VectorOf<Element, Count>::Type;

// Lanes of the arithmetic on elements T, and of its bits.
template <class T>
struct Lanes {
    using Real = typename Arithmetic<T>::Real;
    using Int = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
    static constexpr int kCount = NMCOMPILE_VECTOR_BYTES / sizeof(Real);
    using Reals = Vector<Real, kCount>;
    using Ints = Vector<Int, kCount>;
};

template <class Vector>
inline Vector load(const void* from) {
    Vector result;
    __builtin_memcpy(&result, from, sizeof(result));
    return result;
}

template <class Vector>
inline void store(const Vector& vector, void* to) {
    __builtin_memcpy(to, &vector, sizeof(vector));
}

// Stores to memory that is not read soon, without fetching it first. `to` is aligned to the vector's size; other
// threads see the data after `finish_streaming`.
template <class Vector>
inline void stream(const Vector& vector, void* to) {
#if defined(__AVX512F__)
    if constexpr (sizeof(vector) == 64) {
        return _mm512_stream_si512(static_cast<__m512i*>(to), std::bit_cast<__m512i>(vector));
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(vector) == 32) {
        return _mm256_stream_si256(static_cast<__m256i*>(to), std::bit_cast<__m256i>(vector));
    }
#endif
#if defined(__x86_64__)
    if constexpr (sizeof(vector) == 16) {
        return _mm_stream_si128(static_cast<__m128i*>(to), std::bit_cast<__m128i>(vector));
    }
#endif
    store(vector, to);
}

inline void finish_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

template <class Vector>
struct Pair {
    Vector first, second;
};

template <class Vector>
inline constexpr int kLanesOf = sizeof(Vector) / sizeof(std::declval<Vector>()[0]);

// Returns the elements of a, b at even and at odd places.
template <class Vector>
inline Pair<Vector> unzip(Vector a, Vector b) {
#if defined(__AVX2__)
    // Halves first: GCC 12 compiles the form below to permutations across halves, which take three times as long.
    if constexpr (sizeof(Vector) == 32 && kLanesOf<Vector> == 8) {
        const auto x = (__m256i)a, y = (__m256i)b;
        const auto first = (__m256)_mm256_permute2x128_si256(x, y, 0x20);
        const auto second = (__m256)_mm256_permute2x128_si256(x, y, 0x31);
        return {(Vector)_mm256_shuffle_ps(first, second, 0x88), (Vector)_mm256_shuffle_ps(first, second, 0xDD)};
    }
#endif
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        return Pair<Vector>{__builtin_shufflevector(a, b, (2 * I)...), __builtin_shufflevector(a, b, (2 * I + 1)...)};
    }(std::make_integer_sequence<int, kLanesOf<Vector>>{});
}

// Interleaves a and b in two halves: the inverse of `unzip`.
template <class Vector>
inline Pair<Vector> zip(Vector a, Vector b) {
    constexpr int kCount = kLanesOf<Vector>;
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        return Pair<Vector>{__builtin_shufflevector(a, b, (I / 2 + I % 2 * kCount)...),
                            __builtin_shufflevector(a, b, ((I + kCount) / 2 + I % 2 * kCount)...)};
    }(std::make_integer_sequence<int, kCount>{});
}

// The compiler recognizes this form as one instruction, if there is one.
template <class Vector>
inline Vector larger(Vector a, Vector b) {
    return a > b ? a : b;
}

template <class Ints>
inline bool any(Ints mask) {
#if defined(__AVX2__)
    if constexpr (sizeof(Ints) == 32) return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#endif
    constexpr int kWords = sizeof(Ints) / sizeof(std::uint64_t);
    std::uint64_t words[kWords], result = 0;
    __builtin_memcpy(words, &mask, sizeof(mask));
    for (int i = 0; i < kWords; ++i) result |= words[i];
    return result != 0;
}

}  // namespace nmcompile::NMCOMPILE_ISA
