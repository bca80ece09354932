// Compiled once for each instruction set, with NMCOMPILE_ISA as its name. Loops have independent iterations, so that a
// compiler vectorizes them without reordering sums.

#include "decoder/decoder_isa.h"

#include <bit>

namespace nmcompile::NMCOMPILE_ISA {
namespace {

constexpr int kSums = 16;

// exp(x) to about one unit in the last place, for x from -87 to 88; beyond, that of the nearer end.
inline float exponential(float x) {
    constexpr float kRound = 3 << 22, kHigh = 0x1.62e4p-1f, kLow = 0x1.7f7d1cp-20f;
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float power = x * 0x1.715476p0f + kRound - kRound;
    const float rest = x - power * kHigh - power * kLow;
    float sum = 0x1.a01a02p-13f;
    sum = sum * rest + 0x1.6c16c2p-10f;
    sum = sum * rest + 0x1.111112p-7f;
    sum = sum * rest + 0x1.555556p-5f;
    sum = sum * rest + 0x1.555556p-3f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    return sum * std::bit_cast<float>((static_cast<std::int32_t>(power) + 127) << 23);
}

template <class Term>
inline float total(std::int64_t count, const Term& term) {
    float sums[kSums] = {};
    std::int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int lane = 0; lane < kSums; ++lane) sums[lane] += term(i + lane);
    }
    for (; i < count; ++i) sums[i % kSums] += term(i);
    float result = 0;
    for (const float sum : sums) result += sum;
    return result;
}

void attend_one(const HeadJob& job, const float* query, float* output) {
    float* const scores = job.scores;
    for (std::int64_t t = 0; t < job.positions; ++t) scores[t] = 0;
    for (std::int64_t d = 0; d < job.width; ++d) {
        const float factor = query[d] * job.scale, *const keys = job.keys + d * job.length;
        for (std::int64_t t = 0; t < job.positions; ++t) scores[t] += factor * keys[t];
    }
    float most = scores[0];
    for (std::int64_t t = 1; t < job.positions; ++t) most = scores[t] > most ? scores[t] : most;
    for (std::int64_t t = 0; t < job.positions; ++t) scores[t] = exponential(scores[t] - most);
    const float sum = total(job.positions, [&](std::int64_t t) { return scores[t]; });
    for (std::int64_t d = 0; d < job.width; ++d) output[d] = 0;
    for (std::int64_t t = 0; t < job.positions; ++t) {
        const float share = scores[t] / sum, *const value = job.values + t * job.width;
        for (std::int64_t d = 0; d < job.width; ++d) output[d] += share * value[d];
    }
}

}  // namespace

void attend(const HeadJob& job) {
    for (std::int64_t q = 0; q < job.queries_count; ++q) {
        attend_one(job, job.queries + q * job.width, job.output + q * job.width);
    }
}

void normalize(const float* x, const float* gain, float epsilon, std::int64_t width, float* output) {
    const float squares = total(width, [&](std::int64_t i) { return x[i] * x[i]; });
    const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + epsilon);
    for (std::int64_t i = 0; i < width; ++i) output[i] = gain[i] * (x[i] * factor);
}

void gate_values(float* gate, const float* up, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void turn(float* x, const float* cosines, const float* sines, std::int64_t width) {
    const std::int64_t half = width / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
