// From exact sums to codes or floats, with the rounding of each float32 operation in the module's forward.
#pragma once

#include "machine/lanes.h"
#include "network/network_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kFloats = NMCOMPILE_VECTOR_BYTES / 4;
using Floats = Vector<float, kFloats>;
using Integers = Vector<std::int32_t, kFloats>;

// A sum with it has no place for a fraction, and is rounded to even.
constexpr float kRound = 3 << 22;

inline Floats between(Floats x, float low, float high) {
    x = x > low ? x : Floats{} + low;  // a NaN becomes the lowest
    return x < high ? x : Floats{} + high;
}

// Rounds x / step. The product with 1 / step is off by less than 2e-7 of itself, so it decides unless it is next to the
// middle between two integers.
inline Floats rounded(Floats x, float step, float inverse, float low, float high) {
    const Floats near = between(x * inverse, low - 1, high + 1), nearest = near + kRound - kRound;
    const Floats away = near - nearest;
    if (!any((away > 0.4998f) | (away < -0.4998f))) return between(nearest, low, high);
    return between(between(x / step, low - 1, high + 1) + kRound - kRound, low, high);
}

inline Floats affine(Integers sums, const Affine& by, std::int64_t out) {
    const Floats scaled = __builtin_convertvector(sums, Floats) * load<Floats>(by.steps + out);
    return (scaled + load<Floats>(by.bias + out)) * load<Floats>(by.gain + out) + load<Floats>(by.shift + out);
}

// The rest of a layer for one block of out-channels.
struct Line {
    const LayerJob& job;
    std::int64_t out;      // the first of them, which the factors count from
    std::int64_t count;    // how many there are, up to kOuts
    std::int32_t zeros[kOuts];  // the input's zero times the sums of their integers

    Line(const LayerJob& job, std::int64_t out, std::int64_t count) : job(job), out(out), count(count) {
        for (std::int64_t i = 0; i < kOuts; ++i) zeros[i] = i < count ? job.zero * job.layer->sums()[out + i] : 0;
    }

    void to_codes(const std::int32_t* sums, std::uint8_t* codes) const {
        const float low = static_cast<float>(job.low), high = static_cast<float>(job.high), inverse = 1 / job.step;
        std::uint8_t all[kOuts];
        for (std::int64_t i = 0; i < kOuts; i += kFloats) {
            const Integers sum = load<Integers>(sums + i) - load<Integers>(zeros + i);
            const Floats steps = rounded(affine(sum, job.affine, out + i), job.step, inverse, low, high);
            const Integers found = __builtin_convertvector(steps, Integers) - job.low;
            const auto bytes = __builtin_convertvector(found, Vector<std::uint8_t, kFloats>);
            store(bytes, all + i);
        }
        if (count == kOuts) {
            __builtin_memcpy(codes, all, kOuts);
        } else {
            for (std::int64_t i = 0; i < count; ++i) codes[i] = all[i];
        }
    }

    void to_floats(const std::int32_t* sums, float* to, std::int64_t stride) const {
        float all[kOuts];
        for (std::int64_t i = 0; i < kOuts; i += kFloats) {
            store(affine(load<Integers>(sums + i) - load<Integers>(zeros + i), job.affine, out + i), all + i);
        }
        for (std::int64_t i = 0; i < count; ++i) to[i * stride] = all[i];
    }
};

}  // namespace nmcompile::NMCOMPILE_ISA
