// Maps of codes to codes: tables, and 4:8 pruning along channels.
#pragma once

#include "machine/lanes.h"
#include "network/network_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kMapped = NMCOMPILE_VECTOR_BYTES;
using Mapped = Vector<std::uint8_t, kMapped>;

inline void look_up(std::uint8_t* codes, std::int64_t count, const std::uint8_t* table) {
    std::int64_t i = 0;
#if defined(__AVX512VBMI__)
    const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 64);
    const __m512i third = _mm512_loadu_si512(table + 128), fourth = _mm512_loadu_si512(table + 192);
    for (; i < count; i += 64) {
        const __mmask64 inside = count - i < 64 ? (__mmask64{1} << (count - i)) - 1 : ~__mmask64{0};
        const __m512i x = _mm512_maskz_loadu_epi8(inside, codes + i);
        const __m512i lower = _mm512_permutex2var_epi8(first, x, second), upper = _mm512_permutex2var_epi8(third, x, fourth);
        _mm512_mask_storeu_epi8(codes + i, inside, _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(x), upper));
    }
#endif
    for (; i < count; ++i) codes[i] = table[codes[i]];
}

// Keeps the four largest of each eight codes; of equal codes the first. `Key` holds 8 * code + 7.
template <class Key>
inline void prune_eights(std::uint8_t* codes, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 8) {
        Key keys[8];
        for (int k = 0; k < 8; ++k) keys[k] = static_cast<Key>(8 * codes[i + k] + 7 - k);
        for (int k = 0; k < 8; ++k) {
            int larger = 0;
            for (int other = 0; other < 8; ++other) larger += keys[other] > keys[k];
            if (larger >= 4) codes[i + k] = 0;
        }
    }
}

// The same for codes below 16, whose keys fit into signed bytes: compares each key with the seven others of its eight,
// by turning the eight.
inline void prune_small(std::uint8_t* codes, std::int64_t count) {
    using Keys = Vector<std::int8_t, kMapped>;
    using Eights = Vector<std::uint64_t, kMapped / 8>;
    const auto order = std::bit_cast<Keys>(Eights{} + 0x0001020304050607u);  // 7 for the first of eight
    std::int64_t i = 0;
    for (; i + kMapped <= count; i += kMapped) {
        const auto x = load<Mapped>(codes + i);
        const auto scaled = std::bit_cast<Keys>(std::bit_cast<Eights>(x) << 3);  // no bit leaves its byte
        const Keys keys = scaled + order;
        Keys larger = {};
#pragma GCC unroll 7
        for (int turn = 8; turn < 64; turn += 8) {
            const auto eights = std::bit_cast<Eights>(keys);
            larger += std::bit_cast<Keys>((eights << turn) | (eights >> (64 - turn))) > keys;  // true is -1
        }
        store(x & std::bit_cast<Mapped>(larger > -4), codes + i);
    }
    prune_eights<std::int16_t>(codes + i, count - i);
}

inline void finish_codes(std::uint8_t* codes, std::int64_t count, const Finish& finish) {
    if (finish.table) look_up(codes, count, finish.table);
    if (finish.prunes) prune_small(codes, count);
}

}  // namespace nmcompile::NMCOMPILE_ISA
