// Comparisons of vectors, and selections by their results. AVX-512 has registers for masks, which the compiler does not
// use for expressions of masks; elsewhere a mask is a vector of ones and zeros.
#pragma once

#include "machine/lanes.h"

// For functions that are called with rows of vectors: the rows stay in registers only if the call is inlined.
#define NMCOMPILE_INLINE inline __attribute__((always_inline))

namespace nmcompile::NMCOMPILE_ISA {

template <class V>
using LaneOf = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

template <int Bytes>
using IntOf = std::conditional_t<Bytes == 8, std::int64_t, std::conditional_t<Bytes == 4, std::int32_t, std::int16_t>>;

// As many integers of the same size.
template <class V>
using IntsOf = Vector<IntOf<sizeof(LaneOf<V>)>, kLanesOf<V>>;

template <class V>
inline constexpr bool kIsReal = std::is_floating_point_v<LaneOf<V>>;

template <class V>
inline IntsOf<V> bits(V v) {
    return __builtin_bit_cast(IntsOf<V>, v);
}

#if defined(__AVX512BW__) && defined(__AVX512DQ__)

template <class V>
struct Mask {
    using Word = std::conditional_t<kLanesOf<V> == 32, std::uint32_t,
                                    std::conditional_t<kLanesOf<V> == 16, std::uint16_t, std::uint8_t>>;
    Word word;

    // The compiler would compute plain integers in other registers, and move masks to and fro.
    Mask operator&(Mask other) const {
        if constexpr (sizeof(Word) == 4) return {_kand_mask32(word, other.word)};
        if constexpr (sizeof(Word) == 2) return {_kand_mask16(word, other.word)};
        if constexpr (sizeof(Word) == 1) return {_kand_mask8(word, other.word)};
    }
    Mask operator|(Mask other) const {
        if constexpr (sizeof(Word) == 4) return {_kor_mask32(word, other.word)};
        if constexpr (sizeof(Word) == 2) return {_kor_mask16(word, other.word)};
        if constexpr (sizeof(Word) == 1) return {_kor_mask8(word, other.word)};
    }
    Mask without(Mask other) const {
        if constexpr (sizeof(Word) == 4) return {_kandn_mask32(other.word, word)};
        if constexpr (sizeof(Word) == 2) return {_kandn_mask16(other.word, word)};
        if constexpr (sizeof(Word) == 1) return {_kandn_mask8(other.word, word)};
    }
    Mask operator~() const {
        if constexpr (sizeof(Word) == 4) return {_knot_mask32(word)};
        if constexpr (sizeof(Word) == 2) return {_knot_mask16(word)};
        if constexpr (sizeof(Word) == 1) return {_knot_mask8(word)};
    }
};

template <class V, int Predicate, int IntPredicate>
inline Mask<V> compare(V a, V b) {
    constexpr int kSize = sizeof(LaneOf<V>);
    if constexpr (kIsReal<V>) {
        if constexpr (kSize == 4) return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, Predicate)};
        if constexpr (kSize == 8) return {_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, Predicate)};
    } else {
        if constexpr (kSize == 2) return {_mm512_cmp_epi16_mask((__m512i)a, (__m512i)b, IntPredicate)};
        if constexpr (kSize == 4) return {_mm512_cmp_epi32_mask((__m512i)a, (__m512i)b, IntPredicate)};
        if constexpr (kSize == 8) return {_mm512_cmp_epi64_mask((__m512i)a, (__m512i)b, IntPredicate)};
    }
}

template <class V>
inline Mask<V> greater(V a, V b) {
    return compare<V, _CMP_GT_OQ, _MM_CMPINT_NLE>(a, b);
}
template <class V>
inline Mask<V> at_least(V a, V b) {
    return compare<V, _CMP_GE_OQ, _MM_CMPINT_NLT>(a, b);
}
template <class V>
inline Mask<V> equal(V a, V b) {
    return compare<V, _CMP_EQ_OQ, _MM_CMPINT_EQ>(a, b);
}

// Returns lanes of a where the mask is set, else of b.
template <class V, class M>
inline V select(Mask<M> mask, V a, V b) {
    static_assert(kLanesOf<V> == kLanesOf<M> && sizeof(V) == 64);
    constexpr int kSize = sizeof(LaneOf<V>);
    const auto from = (__m512i)b, to = (__m512i)a;
    if constexpr (kSize == 2) return (V)_mm512_mask_blend_epi16(mask.word, from, to);
    if constexpr (kSize == 4) return (V)_mm512_mask_blend_epi32(mask.word, from, to);
    if constexpr (kSize == 8) return (V)_mm512_mask_blend_epi64(mask.word, from, to);
}

template <class V>
inline bool any(Mask<V> mask) {
    return mask.word != 0;
}

// Bit l is the value of lane l.
template <class V>
inline std::uint64_t lane_bits(Mask<V> mask) {
    return mask.word;
}

#else

template <class V>
struct Mask {
    IntsOf<V> lanes;

    Mask operator&(Mask other) const { return {lanes & other.lanes}; }
    Mask operator|(Mask other) const { return {lanes | other.lanes}; }
    Mask without(Mask other) const { return {lanes & ~other.lanes}; }
    Mask operator~() const { return {~lanes}; }
};

template <class V>
inline Mask<V> greater(V a, V b) {
    return {__builtin_bit_cast(IntsOf<V>, a > b)};
}
template <class V>
inline Mask<V> at_least(V a, V b) {
    return {__builtin_bit_cast(IntsOf<V>, a >= b)};
}
template <class V>
inline Mask<V> equal(V a, V b) {
    return {__builtin_bit_cast(IntsOf<V>, a == b)};
}

// Returns lanes of a where the mask is set, else of b.
template <class V, class M>
inline V select(Mask<M> mask, V a, V b) {
    const auto ones = mask.lanes;
    return __builtin_bit_cast(V, (bits(a) & ones) | (bits(b) & ~ones));
}

template <class V>
inline bool any(Mask<V> mask) {
    return any(mask.lanes);
}

// Bit l is the value of lane l.
template <class V>
inline std::uint64_t lane_bits(Mask<V> mask) {
    std::uint64_t result = 0;
    for (int l = 0; l < kLanesOf<V>; ++l) result |= static_cast<std::uint64_t>(mask.lanes[l] & 1) << l;
    return result;
}

#endif

// Returns lanes of a where the mask is set, else zero.
template <class V, class M>
inline V keep(Mask<M> mask, V a) {
    return select(mask, a, V{});
}

}  // namespace nmcompile::NMCOMPILE_ISA
