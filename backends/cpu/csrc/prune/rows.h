// Rows of blocks: row i holds element i of as many blocks as a vector has lanes, as integers of the element's size.
#pragma once

#include <cstdint>

#include "machine/masks.h"
#include "machine/storage.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T>
using Bits = IntOf<sizeof(T)>;
template <class T>
using Row = Vector<Bits<T>, NMCOMPILE_VECTOR_BYTES / sizeof(T)>;
template <class T>
using Reals = typename Lanes<T>::Reals;
template <class T>
inline constexpr int kParts = sizeof(typename Arithmetic<T>::Real) / sizeof(T);  // vectors of reals per row

// An int that the compiler knows: loops over it unroll.
template <int Value>
struct Constant {
    constexpr operator int() const { return Value; }
};

// Reads `Count` vectors of a row of memory, block after block, into rows.
template <int Count, class V>
NMCOMPILE_INLINE void unzip_rows(V* v) {
    if constexpr (Count > 1) {
        V even[Count / 2], odd[Count / 2];
        for (int k = 0; k < Count / 2; ++k) {
            const Pair<V> both = unzip(v[2 * k], v[2 * k + 1]);
            even[k] = both.first;
            odd[k] = both.second;
        }
        unzip_rows<Count / 2>(even);
        unzip_rows<Count / 2>(odd);
        for (int k = 0; k < Count / 2; ++k) {
            v[2 * k] = even[k];
            v[2 * k + 1] = odd[k];
        }
    }
}

// Inverts the above.
template <int Count, class V>
NMCOMPILE_INLINE void zip_rows(V* v) {
    if constexpr (Count > 1) {
        V even[Count / 2], odd[Count / 2];
        for (int k = 0; k < Count / 2; ++k) {
            even[k] = v[2 * k];
            odd[k] = v[2 * k + 1];
        }
        zip_rows<Count / 2>(even);
        zip_rows<Count / 2>(odd);
        for (int k = 0; k < Count / 2; ++k) {
            const Pair<V> both = zip(even[k], odd[k]);
            v[2 * k] = both.first;
            v[2 * k + 1] = both.second;
        }
    }
}

// Returns half of the lanes, 0 or 1.
template <int Which, class V>
NMCOMPILE_INLINE auto half(V v) {
    constexpr int kCount = kLanesOf<V> / 2;
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(v, v, (I + Which * kCount)...);
    }(std::make_integer_sequence<int, kCount>{});
}

template <class H>
NMCOMPILE_INLINE auto both_halves(H a, H b) {
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, I...);
    }(std::make_integer_sequence<int, 2 * kLanesOf<H>>{});
}

// `widen` and `narrow` of storage.h for vectors; a row of 16-bit numbers widens to two vectors of floats.
template <class T>
struct Convert {
    static NMCOMPILE_INLINE void widen(Row<T> row, Reals<T>* x) { x[0] = __builtin_bit_cast(Reals<T>, row); }
    static NMCOMPILE_INLINE Row<T> narrow(const Reals<T>* x) { return __builtin_bit_cast(Row<T>, x[0]); }
};

template <class T>
struct Convert16 {
    using Floats = Reals<T>;
    using Words = Vector<std::uint32_t, kLanesOf<Floats>>;
    using Halves = Vector<std::uint16_t, kLanesOf<Floats>>;

    static NMCOMPILE_INLINE void widen(Row<T> row, Floats* x) {
        const auto bits = __builtin_bit_cast(Vector<std::uint16_t, 2 * kLanesOf<Floats>>, row);
        x[0] = Convert<T>::widen_half(half<0>(bits));
        x[1] = Convert<T>::widen_half(half<1>(bits));
    }
    static NMCOMPILE_INLINE Row<T> narrow(const Floats* x) {
        return __builtin_bit_cast(Row<T>, both_halves(Convert<T>::narrow_half(x[0]), Convert<T>::narrow_half(x[1])));
    }
};

template <>
struct Convert<BFloat16> : Convert16<BFloat16> {
    static Floats widen_half(Halves x) { return __builtin_bit_cast(Floats, __builtin_convertvector(x, Words) << 16); }
    static Halves narrow_half(Floats x) {
        const Words bits = __builtin_bit_cast(Words, x);
        return __builtin_convertvector((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, Halves);
    }
};

template <>
struct Convert<Half> : Convert16<Half> {
#if defined(__AVX512F__)
    static Floats widen_half(Halves x) { return (Floats)_mm512_cvtph_ps((__m256i)x); }
    static Halves narrow_half(Floats x) { return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
    static Floats widen_half(Halves x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
    static Halves narrow_half(Floats x) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
    static Floats widen_half(Halves x) {
        const Words bits = __builtin_convertvector(x, Words);
        const Words magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
        const Words finite = __builtin_bit_cast(Words, __builtin_bit_cast(Floats, magnitude) * 0x1p112f);
        const Words special = magnitude | 0x7F800000u;
        return __builtin_bit_cast(Floats, sign | (magnitude >= (0x7C00u << 13) ? special : finite));
    }
    static Halves narrow_half(Floats x) {
        const Words bits = __builtin_bit_cast(Words, x), magnitude = bits & 0x7FFFFFFFu;
        const Words rebiased = magnitude - (112u << 23);
        const Words normal = (rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13;
        const Words subnormal =
            __builtin_bit_cast(Words, __builtin_bit_cast(Floats, magnitude) + 0.5f) - (126u << 23);
        const Words finite = magnitude < (113u << 23) ? subnormal : normal;
        const Words result = magnitude < (143u << 23) ? finite : 0x7C00u + Words{};
        return __builtin_convertvector(((bits >> 16) & 0x8000u) | result, Halves);
    }
#endif
};

}  // namespace nmcompile::NMCOMPILE_ISA
