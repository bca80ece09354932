// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "packed_integers_isa.h"

#include "floats.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

constexpr int kSteps = kBlockDepth / kStepDepth;
constexpr int kParts = kStepLanes / kFloats;  // vectors that make up the lanes of a step
constexpr int kPairs = kBlockRows / 2;
// As many sums as leave registers for what is decoded: 32 with AVX-512, else 16.
constexpr int kMostTokens = sizeof(Floats) == 64 ? 8 : 4;

// Of each four floats those whose places the lowest two bits of the four words name.
inline Floats at_places(Floats x, FloatInts words) {
#if defined(__AVX512F__)
    return std::bit_cast<Floats>(_mm512_permutevar_ps(std::bit_cast<__m512>(x), std::bit_cast<__m512i>(words)));
#elif defined(__AVX2__)
    return std::bit_cast<Floats>(_mm256_permutevar_ps(std::bit_cast<__m256>(x), std::bit_cast<__m256i>(words)));
#else
    Floats result;
    for (int i = 0; i < kFloats; ++i) result[i] = x[i / 4 * 4 + (words[i] & 3)];
    return result;
#endif
}

// The integers of a step as floats.
inline Floats integers_of(FloatInts words, int step) {
#if defined(__AVX512F__)
    // A permutation reads the lowest four bits: it is a table, and saves the conversion.
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return std::bit_cast<Floats>(_mm512_permutexvar_ps(_mm512_srli_epi32(std::bit_cast<__m512i>(words), 4 * step), table));
#else
    return __builtin_convertvector(words << (28 - 4 * step) >> 28, Floats);
#endif
}

// Sums of one block of rows and some tokens. One token alone has sums for each part, so that enough of them are under
// way to hide the latency of a multiply-add.
template <int kTokens>
struct Sums {
    static constexpr int kApart = kTokens == 1 ? kParts : 1;
    Floats of[kPairs][kTokens][kApart];

    // What one row of a pair adds up to: half of the lanes of each four.
    float total(int row, int token) const {
        Floats sum = of[row / 2][token][0];
        for (int part = 1; part < kApart; ++part) sum += of[row / 2][token][part];
        float result = 0.0f;
        for (int lane = row % 2 * 2; lane < kFloats; lane += 4) result += sum[lane] + sum[lane + 1];
        return result;
    }
};

template <int kTokens>
[[gnu::always_inline]] inline void add_block(const std::uint32_t* words, const float* input, Index stride,
                                             Sums<kTokens>& sums) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
        const std::uint32_t* const lanes = words + part * kFloats;
        const FloatInts places = load<FloatInts>(lanes);
        const FloatInts values[kPairs] = {load<FloatInts>(lanes + kStepLanes), load<FloatInts>(lanes + 2 * kStepLanes)};
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step) {
            Floats integers[kPairs];
#pragma GCC unroll 2
            for (int pair = 0; pair < kPairs; ++pair) integers[pair] = integers_of(values[pair], step);
#pragma GCC unroll 8
            for (int token = 0; token < kTokens; ++token) {
                const Floats x = load<Floats>(input + token * stride + step * kStepDepth + part * kFloats);
#pragma GCC unroll 2
                for (int pair = 0; pair < kPairs; ++pair) {
                    Floats& sum = sums.of[pair][token][kTokens == 1 ? part : 0];
                    sum = multiply_add(integers[pair], at_places(x, places >> 2 * (kSteps * pair + step)), sum);
                }
            }
        }
    }
}

template <int kTokens>
void multiply_tokens(const IntegersJob& job, Index block, Index token) {
    const Index stride = job.blocks * kBlockDepth, first = block * kBlockRows;
    const std::uint32_t* words = job.words + block * job.blocks * kBlockWords;
    const float* input = job.input + token * stride;
    Sums<kTokens> sums{};
    for (Index i = 0; i < job.blocks; ++i, words += kBlockWords, input += kBlockDepth) {
        add_block<kTokens>(words, input, stride, sums);
    }
    for (Index row = first; row < smaller(job.rows, first + kBlockRows); ++row) {
        for (int t = 0; t < kTokens; ++t) {
            const float scaled = sums.total(static_cast<int>(row - first), t) * job.steps[row];
            job.output[(token + t) * job.rows + row] = scaled + (job.bias ? job.bias[row] : 0.0f);
        }
    }
}

}  // namespace

void multiply_integers(const IntegersJob& job, std::int64_t first, std::int64_t last) {
    static constexpr decltype(&multiply_tokens<1>) kernels[] = {
        multiply_tokens<1>, multiply_tokens<2>, multiply_tokens<3>, multiply_tokens<4>,
        multiply_tokens<5>, multiply_tokens<6>, multiply_tokens<7>, multiply_tokens<8>};
    // All rows for some tokens before the next: the words come from a cache then.
    for (Index token = 0; token < job.tokens;) {
        const Index tiles = (job.tokens - token + kMostTokens - 1) / kMostTokens;
        const Index count = (job.tokens - token + tiles - 1) / tiles;  // no tile much narrower than the others
        for (Index block = first; block < last; ++block) kernels[count - 1](job, block, token);
        token += count;
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
