// Maps of codes to codes: tables, and 4:8 pruning along channels.
#pragma once

#include "machine/lanes.h"
#include "network/network_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kMapped = NMCOMPILE_VECTOR_BYTES;
using Mapped = Vector<std::uint8_t, kMapped>;

// Loads up to `count` codes, and zeros behind them.
inline Mapped load_some(const std::uint8_t* from, std::int64_t count) {
    if (count >= kMapped) return load<Mapped>(from);
#if defined(__AVX512BW__)
    return std::bit_cast<Mapped>(_mm512_maskz_loadu_epi8((__mmask64{1} << count) - 1, from));
#else
    Mapped result = {};
    __builtin_memcpy(&result, from, count);
    return result;
#endif
}

inline void store_some(Mapped codes, std::int64_t count, std::uint8_t* to) {
    if (count >= kMapped) return store(codes, to);
#if defined(__AVX512BW__)
    _mm512_mask_storeu_epi8(to, (__mmask64{1} << count) - 1, std::bit_cast<__m512i>(codes));
#else
    __builtin_memcpy(to, &codes, count);
#endif
}

inline void look_up(std::uint8_t* codes, std::int64_t count, const std::uint8_t* table) {
#if defined(__AVX512VBMI__)
    const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 64);
    const __m512i third = _mm512_loadu_si512(table + 128), fourth = _mm512_loadu_si512(table + 192);
    for (std::int64_t i = 0; i < count; i += kMapped) {
        const auto x = std::bit_cast<__m512i>(load_some(codes + i, count - i));
        const __m512i lower = _mm512_permutex2var_epi8(first, x, second), upper = _mm512_permutex2var_epi8(third, x, fourth);
        const __m512i found = _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(x), upper);
        store_some(std::bit_cast<Mapped>(found), count - i, codes + i);
    }
#else
    for (std::int64_t i = 0; i < count; ++i) codes[i] = table[codes[i]];
#endif
}

// Keeps the four largest of each eight codes, which are below 16; of equal codes the first. A key is 8 * code + 7 less the
// place in the eight: no two are equal, and they fit into signed bytes. Each is compared with the seven others by turning
// the eight.
inline Mapped pruned(Mapped codes) {
    using Keys = Vector<std::int8_t, kMapped>;
    using Eights = Vector<std::uint64_t, kMapped / 8>;
    const auto order = std::bit_cast<Keys>(Eights{} + 0x0001020304050607u);  // 7 for the first of eight
    const Keys keys = std::bit_cast<Keys>(std::bit_cast<Eights>(codes) << 3) + order;  // no bit leaves its byte
    const auto eights = std::bit_cast<Eights>(keys);
    Keys larger = {};
#pragma GCC unroll 7
    for (int turn = 8; turn < 64; turn += 8) {
        larger += std::bit_cast<Keys>((eights << turn) | (eights >> (64 - turn))) > keys;  // true is -1
    }
    return codes & std::bit_cast<Mapped>(larger > -4);
}

inline void prune(std::uint8_t* codes, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kMapped) {
        store_some(pruned(load_some(codes + i, count - i)), count - i, codes + i);
    }
}

inline void finish_codes(std::uint8_t* codes, std::int64_t count, const Finish& finish) {
    if (finish.table) look_up(codes, count, finish.table);
    if (finish.prunes) prune(codes, count);
}

}  // namespace nmcompile::NMCOMPILE_ISA
