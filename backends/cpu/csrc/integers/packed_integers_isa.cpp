// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "integers/packed_integers_isa.h"

#include "machine/lanes.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

using Index = std::int64_t;

// How far ahead bytes are prefetched: the processor alone does not look far enough. From memory, in large pages, one
// token of a 4096 x 4096 matrix takes 0.23 ms with 8 blocks on Zen 4, 0.20 with 32, and 0.27 with 128.
[[maybe_unused]] constexpr Index kAhead = 32 * kBlockBytes;

inline Index smaller(Index a, Index b) { return a < b ? a : b; }

#if defined(__AVX2__)
constexpr int kBytes = NMCOMPILE_VECTOR_BYTES;
constexpr int kMostTokens = kBytes == 64 ? 8 : 4;  // as many sums as leave registers for decoding
using Bytes = Vector<std::uint8_t, kBytes>;
using Words = Vector<std::uint16_t, kBytes / 2>;
using Sums = Vector<std::int32_t, kBytes / 4>;

// Shifts bytes to where a mask extracts the wanted bits.
template <int kBits>
Bytes shifted(Bytes x) {
    if constexpr (kBits < 0) return std::bit_cast<Bytes>(std::bit_cast<Words>(x) << -kBits);
    return std::bit_cast<Bytes>(std::bit_cast<Words>(x) >> kBits);
}

// For each lane, the byte of its sixteen that it multiplies, before the place in the four is added.
inline Bytes first_places() {
    Bytes result;
    for (int i = 0; i < kBytes; ++i) result[i] = static_cast<std::uint8_t>(i % 8 / 2 * 4);
    return result;
}

// Half of a block, for two rows.
struct Half {
    Bytes places, integers;  // the integers times 16, as they stay in the upper half of their bytes
};

template <int kPair, int kHalf>
Half half_of(Bytes places, Bytes integers) {
    const Bytes two_bits = Bytes{} + std::uint8_t{3}, upper = Bytes{} + std::uint8_t{0xF0};
    return {(shifted<2 * (2 * kPair + kHalf)>(places) & two_bits) | first_places(),
            shifted<kHalf ? 0 : -4>(integers) & upper};
}

// Returns sums of two products, in 16 bits: at most 2 * 15 * 112.
inline Words products(const std::uint8_t* input, const Half& half) {
#if defined(__AVX512BW__)
    const __m512i x = _mm512_shuffle_epi8(_mm512_loadu_si512(input), std::bit_cast<__m512i>(half.places));
    return std::bit_cast<Words>(_mm512_maddubs_epi16(x, std::bit_cast<__m512i>(half.integers)));
#else
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(input));
    const __m256i x = _mm256_shuffle_epi8(from, std::bit_cast<__m256i>(half.places));
    return std::bit_cast<Words>(_mm256_maddubs_epi16(x, std::bit_cast<__m256i>(half.integers)));
#endif
}

inline Sums pair_sums(Words x) {
#if defined(__AVX512BW__)
    return std::bit_cast<Sums>(_mm512_madd_epi16(std::bit_cast<__m512i>(x), _mm512_set1_epi16(1)));
#else
    return std::bit_cast<Sums>(_mm256_madd_epi16(std::bit_cast<__m256i>(x), _mm256_set1_epi16(1)));
#endif
}

template <int kPair, int kTokens>
[[gnu::always_inline]] inline void add_pair(Bytes places, Bytes integers, const std::uint8_t* input, Index stride,
                                            Sums* sums) {
    const Half first = half_of<kPair, 0>(places, integers), second = half_of<kPair, 1>(places, integers);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
        const std::uint8_t* const x = input + t * stride;
        sums[t] += pair_sums(products(x, first) + products(x + kBlockDepth / 2, second));
    }
}

// Sums the four rows of a row of blocks, for some tokens.
template <int kTokens>
void add_blocks(const IntegersJob& job, const std::uint8_t* block, const std::uint8_t* input, Index stride,
                std::int32_t (*totals)[kBlockRows]) {
    Sums sums[2][kTokens] = {};
    for (Index i = 0; i < job.blocks; ++i, block += kBlockBytes, input += kBlockDepth) {
        for (int line = 0; line < kBlockBytes; line += kLaneBytes) __builtin_prefetch(block + kAhead + line, 0, 0);
#pragma GCC unroll 2
        for (int at = 0; at < kLaneBytes; at += kBytes) {
            const Bytes places = load<Bytes>(block + at);
            add_pair<0, kTokens>(places, load<Bytes>(block + kLaneBytes + at), input + at, stride, sums[0]);
            add_pair<1, kTokens>(places, load<Bytes>(block + 2 * kLaneBytes + at), input + at, stride, sums[1]);
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int row = 0; row < kBlockRows; ++row) {
            std::int32_t total = 0;
            for (int i = row % 2 * 2; i < kBytes / 4; i += 4) total += sums[row / 2][t][i] + sums[row / 2][t][i + 1];
            totals[t][row] = total / 16;
        }
    }
}
#else
constexpr int kMostTokens = 8;

// As above, straight from the definition of the layout.
template <int kTokens>
void add_blocks(const IntegersJob& job, const std::uint8_t* block, const std::uint8_t* input, Index stride,
                std::int32_t (*totals)[kBlockRows]) {
    for (int t = 0; t < kTokens; ++t) {
        for (int row = 0; row < kBlockRows; ++row) totals[t][row] = 0;
    }
    for (Index i = 0; i < job.blocks; ++i, block += kBlockBytes, input += kBlockDepth) {
        for (int lane = 0; lane < kLaneBytes; ++lane) {
            const int from = lane / 16 * 16 + lane % 8 / 2 * 4;
            for (int field = 0; field < 4; ++field) {
                const int pair = field / 2, half = field % 2;
                const int place = from + half * kBlockDepth / 2 + (block[lane] >> 2 * field & 3);
                const int nibble = block[(1 + pair) * kLaneBytes + lane] >> 4 * half & 15;
                const int integer = nibble < 8 ? nibble : nibble - 16;
                const int row = 2 * pair + lane / 8 % 2;
                for (int t = 0; t < kTokens; ++t) totals[t][row] += integer * input[t * stride + place];
            }
        }
    }
}
#endif

template <int kTokens>
void multiply_tokens(const IntegersJob& job, Index row, Index token) {
    const Index stride = job.blocks * kBlockDepth;
    std::int32_t totals[kTokens][kBlockRows];
    const std::uint8_t* const block = job.bytes + row / kBlockRows * job.blocks * kBlockBytes;
    add_blocks<kTokens>(job, block, job.input + token * stride, stride, totals);
    for (Index r = row; r < smaller(job.rows, row + kBlockRows); ++r) {
        for (int t = 0; t < kTokens; ++t) {
            const std::int32_t total = totals[t][r - row] - job.input_zero * job.sums[r];
            const float scaled = static_cast<float>(total) * job.steps[r];
            job.output[(token + t) * job.rows + r] = scaled + (job.bias ? job.bias[r] : 0.0f);
        }
    }
}

}  // namespace

void multiply_integers(const IntegersJob& job, std::int64_t first, std::int64_t last) {
    static constexpr decltype(&multiply_tokens<1>) kernels[] = {
        multiply_tokens<1>, multiply_tokens<2>, multiply_tokens<3>, multiply_tokens<4>,
        multiply_tokens<5>, multiply_tokens<6>, multiply_tokens<7>, multiply_tokens<8>};
    // Runs all rows for some tokens before the next tokens: the integers then come from a cache.
    for (Index token = 0; token < job.tokens;) {
        const Index tiles = (job.tokens - token + kMostTokens - 1) / kMostTokens;
        const Index count = (job.tokens - token + tiles - 1) / tiles;  // no tile much narrower than the others
        for (Index row = first; row < last; row += kBlockRows) kernels[count - 1](job, row, token);
        token += count;
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
