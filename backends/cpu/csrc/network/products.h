// Sums of products of a tile: pixels x kOuts, for one block of out-channels.
//
// Of the sparse form, a byte of input holds the codes of two pixels, so one permutation selects the factors of both. With
// VNNI, one sum adds (a + 16 b) w and the other a w; their difference is 16 b w. All integers are kept times 16, as they
// stand in the upper half of their bytes.
#pragma once

#include <cstdint>

#include "machine/lanes.h"
#include "network/integer_layer.h"

namespace nmcompile::NMCOMPILE_ISA {

using Index = std::int64_t;

// Sums start with minus the code of zero times the integers.
struct Start {
    const std::int32_t* integers;  // sums of them, of kOuts out-channels
    std::int32_t zero;
};

#if defined(__AVX2__)
constexpr int kBytes = NMCOMPILE_VECTOR_BYTES;
constexpr int kParts = static_cast<int>(kBlock) / kBytes;  // vectors of a block
constexpr int kOutsOfPart = kBytes / 4;
constexpr int kFirstTimes = 16;  // sums of the first of two pixels come times this, of the second times kSecondTimes
using Bytes = Vector<std::uint8_t, kBytes>;
using Words = Vector<std::int16_t, kBytes / 2>;
using Sums = Vector<std::int32_t, kBytes / 4>;

// Repeats bytes through a vector.
template <class Integer>
inline Bytes repeated(const std::uint8_t* from) {
    Integer bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return std::bit_cast<Bytes>(Vector<Integer, kBytes / sizeof(Integer)>{} + bits);
}

// Returns for each byte of a block its factor: one of the eight bytes at `from`.
inline Bytes selected(Bytes block, const std::uint8_t* from) {
    const Bytes eight = repeated<std::int64_t>(from);
#if defined(__AVX512VBMI__)
    return std::bit_cast<Bytes>(_mm512_permutexvar_epi8(std::bit_cast<__m512i>(block), std::bit_cast<__m512i>(eight)));
#else
    const Bytes places = block & (Bytes{} + std::uint8_t{7});
    return std::bit_cast<Bytes>(_mm256_shuffle_epi8(std::bit_cast<__m256i>(eight), std::bit_cast<__m256i>(places)));
#endif
}

#if defined(__AVX512VNNI__)
inline Sums with_products(Sums sums, Bytes codes, Bytes integers) {
    return std::bit_cast<Sums>(_mm512_dpbusd_epi32(std::bit_cast<__m512i>(sums), std::bit_cast<__m512i>(codes),
                                                   std::bit_cast<__m512i>(integers)));
}

// Adds products of selected codes of two pixels.
inline void add_two(Bytes selected, Bytes integers, Sums& first, Sums& both) {
    both = with_products(both, selected, integers);
    first = with_products(first, selected & (Bytes{} + std::uint8_t{15}), integers);
}

constexpr int kSecondTimes = 256;
inline Sums second_start(Sums first) { return first * (kSecondTimes / kFirstTimes + 1); }
inline void separate(const Sums& first, Sums& second) { second -= first; }

inline Sums with_dense_products(Sums sums, Bytes codes, Bytes integers) { return with_products(sums, codes, integers); }
#else
// Adds products of four-bit codes, whose sums of two fit into 16 bits.
inline Sums with_small_products(Sums sums, Bytes codes, Bytes integers) {
    const __m256i twos = _mm256_maddubs_epi16(std::bit_cast<__m256i>(codes), std::bit_cast<__m256i>(integers));
    return sums + std::bit_cast<Sums>(_mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}

inline void add_two(Bytes selected, Bytes integers, Sums& first, Sums& second) {
    const Bytes four_bits = Bytes{} + std::uint8_t{15};
    const Bytes upper = std::bit_cast<Bytes>(std::bit_cast<Vector<std::uint16_t, kBytes / 2>>(selected) >> 4);
    first = with_small_products(first, selected & four_bits, integers);
    second = with_small_products(second, upper & four_bits, integers);
}

constexpr int kSecondTimes = 16;
inline Sums second_start(Sums first) { return first; }
inline void separate(const Sums&, Sums&) {}

// Bytes at even and at odd places, since sums of two products of bytes do not fit into 16 bits.
inline Sums with_dense_products(Sums sums, Bytes codes, Bytes integers) {
    const auto x = std::bit_cast<Words>(codes), w = std::bit_cast<Words>(integers);
    const auto unsigned_x = std::bit_cast<Vector<std::uint16_t, kBytes / 2>>(codes);
    const auto even = _mm256_madd_epi16(std::bit_cast<__m256i>(x & 255), std::bit_cast<__m256i>((w << 8) >> 8));
    const auto odd = _mm256_madd_epi16(std::bit_cast<__m256i>(unsigned_x >> 8), std::bit_cast<__m256i>(w >> 8));
    return sums + std::bit_cast<Sums>(even) + std::bit_cast<Sums>(odd);
}
#endif

constexpr int kMostPairs = kBytes == 64 ? 13 : 5;
constexpr int kMostDense = kBytes == 64 ? 26 : 10;

inline Sums start_of_part(Start start, int part) {
    return load<Sums>(start.integers + part * kOutsOfPart) * -start.zero;
}

// Stores sums, pixels x kOuts.
struct StoreSums {
    std::int32_t (*sums)[kOuts];

    template <int kFirst, int kSecond, int kPixels>
    void take(int part, const Sums (&all)[kPixels]) {
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) {
            store(all[p] / (p % 2 == 0 ? kFirst : kSecond), sums[p] + part * kOutsOfPart);
        }
    }
};

// Gives the sums of each part to `taker`. `input` has a row of bytes for each pair of pixels.
template <int kPairs, class Taker>
void sparse_products(const std::uint8_t* input, Index stride, const std::uint8_t* packed, Index blocks, Start start,
                     Taker& taker) {
    for (int part = 0; part < kParts; ++part) {
        Sums sums[2 * kPairs];
        const Sums first = start_of_part(start, part) * kFirstTimes, second = second_start(first);
#pragma GCC unroll 16
        for (int p = 0; p < kPairs; ++p) sums[2 * p] = first, sums[2 * p + 1] = second;
        for (Index k = 0; k < blocks; ++k) {
            const Bytes block = load<Bytes>(packed + k * kBlock + part * kBytes);
            const Bytes integers = block & (Bytes{} + std::uint8_t{0xF0});
#pragma GCC unroll 16
            for (int p = 0; p < kPairs; ++p) {
                add_two(selected(block, input + p * stride + 8 * k), integers, sums[2 * p], sums[2 * p + 1]);
            }
        }
#pragma GCC unroll 16
        for (int p = 0; p < kPairs; ++p) separate(sums[2 * p], sums[2 * p + 1]);
        taker.template take<kFirstTimes, kSecondTimes>(part, sums);
    }
}

template <int kPixels, class Taker>
void dense_products(const std::uint8_t* input, Index stride, const std::uint8_t* packed, Index blocks, Start start,
                     Taker& taker) {
    for (int part = 0; part < kParts; ++part) {
        Sums sums[kPixels];
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) sums[p] = start_of_part(start, part);
        for (Index k = 0; k < blocks; ++k) {
            const Bytes integers = load<Bytes>(packed + k * kBlock + part * kBytes);
#pragma GCC unroll 32
            for (int p = 0; p < kPixels; ++p) {
                sums[p] = with_dense_products(sums[p], repeated<std::int32_t>(input + p * stride + 4 * k), integers);
            }
        }
        taker.template take<1, 1>(part, sums);
    }
}
#else
constexpr int kMostPairs = 13;
constexpr int kMostDense = 26;

struct StoreSums {
    std::int32_t (*sums)[kOuts];
};

// As above, straight from the definitions of the forms.
template <int kPairs, class Taker>
void sparse_products(const std::uint8_t* input, Index stride, const std::uint8_t* packed, Index blocks, Start start,
                     Taker& taker) {
    for (int p = 0; p < kPairs; ++p) {
        for (int out = 0; out < kOuts; ++out) {
            std::int32_t first = start.integers[out] * -start.zero, second = first;
            for (Index k = 0; k < blocks; ++k) {
                for (int i = 0; i < 4; ++i) {
                    const int byte = packed[k * kBlock + 4 * out + i], code = input[p * stride + 8 * k + (byte & 7)];
                    const int integer = static_cast<std::int8_t>(byte) >> 4;
                    first += integer * (code & 15);
                    second += integer * (code >> 4);
                }
            }
            taker.sums[2 * p][out] = first;
            taker.sums[2 * p + 1][out] = second;
        }
    }
}

template <int kPixels, class Taker>
void dense_products(const std::uint8_t* input, Index stride, const std::uint8_t* packed, Index blocks, Start start,
                     Taker& taker) {
    for (int p = 0; p < kPixels; ++p) {
        for (int out = 0; out < kOuts; ++out) {
            std::int32_t sum = start.integers[out] * -start.zero;
            for (Index k = 0; k < blocks; ++k) {
                for (int i = 0; i < 4; ++i) {
                    sum += static_cast<std::int8_t>(packed[k * kBlock + 4 * out + i]) * input[p * stride + 4 * k + i];
                }
            }
            taker.sums[p][out] = sum;
        }
    }
}
#endif

// Calls the kernel for a number of pixels, from tables of all of them.
template <class Taker, int... kCounts>
inline void products(Form form, Index count, const std::uint8_t* input, Index stride, const std::uint8_t* packed,
                     Index blocks, Start start, Taker& taker, std::integer_sequence<int, kCounts...>) {
    using Kernel = void (*)(const std::uint8_t*, Index, const std::uint8_t*, Index, Start, Taker&);
    static constexpr Kernel dense[] = {dense_products<kCounts + 1, Taker>...};
    static constexpr Kernel sparse[] = {sparse_products<kCounts / 2 + 1, Taker>...};
    (form == Form::sparse ? sparse : dense)[count - 1](input, stride, packed, blocks, start, taker);
}

}  // namespace nmcompile::NMCOMPILE_ISA
