// From exact sums to codes or floats, with the rounding of each float32 operation in the module's forward.
#pragma once

#include "network/network_isa.h"
#include "network/fixed_point.h"
#include "network/widen.h"

namespace nmcompile::NMCOMPILE_ISA {

// The grid of the results.
struct Steps {
    Floats step, inverse, low, high;
    std::int32_t lowest;

    explicit Steps(const LayerJob& job)
        : step(Floats{} + job.grid.step),
          inverse(Floats{} + 1 / job.grid.step),
          low(Floats{} + static_cast<float>(job.grid.low)),
          high(Floats{} + static_cast<float>(job.grid.high)),
          lowest(job.grid.low) {}

    // Returns clamp(round(x / step), low, high) - low. The product with 1 / step is off by less than 2e-7 of itself, so
    // it decides unless it is next to the middle between two integers.
    Integers codes(Floats x) const {
        const Floats near = between(x * inverse), nearest = near + kRound;
        const Floats away = near - (nearest - kRound);
        return code(is_any_beyond(away, 0.4998f) ? between(x / step) + kRound : nearest);
    }

private:
    Floats between(Floats x) const {
        x = x > low ? x : low;  // a NaN becomes the lowest
        return x < high ? x : high;
    }

    Integers code(Floats rounded) const { return std::bit_cast<Integers>(rounded) - (kRoundBits + lowest); }
};

// Some of the out-channels of a block, as many as a vector of floats holds: their factors.
template <bool kBias, bool kNorm>
struct Channels {
    Floats steps, bias, gain, shift;

    Channels(const Affine& by, std::int64_t out)
        : steps(load<Floats>(by.steps + out)) {
        if constexpr (kBias) bias = load<Floats>(by.bias + out);
        if constexpr (kNorm) gain = load<Floats>(by.gain + out);
        if constexpr (kNorm) shift = load<Floats>(by.shift + out);
    }

    Floats of(const std::int32_t* sums) const {
        Floats y = __builtin_convertvector(load<Integers>(sums), Floats) * steps;
        if constexpr (kBias) y = y + bias;
        if constexpr (kNorm) y = y * gain + shift;
        return y;
    }
};

// Stores up to `count` codes.
inline void store_some(FewBytes codes, std::int64_t count, std::uint8_t* to) {
    if (count >= kFloats) return store(codes, to);
#if defined(__AVX512F__)
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1 << count) - 1), std::bit_cast<__m128i>(codes));
#else
    for (std::int64_t i = 0; i < count; ++i) to[i] = codes[i];
#endif
}

// Writes the codes of up to kOuts out-channels from `out` on, for some pixels; `to` is each pixel's first code.
template <bool kBias, bool kNorm>
void write_codes(const LayerJob& job, std::int64_t out, std::int64_t count, std::int64_t pixels,
                 const std::int32_t (*sums)[kOuts], std::uint8_t* const* to) {
    const Steps grid(job);
    for (std::int64_t i = 0; i < count; i += kFloats) {
        const Channels<kBias, kNorm> channels(job.affine, out + i);
        const std::int64_t rest = count - i;
        for (std::int64_t p = 0; p < pixels; ++p) {
            store_some(narrowed(grid.codes(channels.of(sums[p] + i))), rest, to[p] + out + i);
        }
    }
}

// Writes the same codes by the scaling of the layer, and by `exact` those which it does not decide, of four pixels.
template <class Exact>
void write_fixed_point_codes(const LayerJob& job, std::int64_t out, std::int64_t count, std::int64_t pixels,
                       const std::int32_t (*sums)[kOuts], std::uint8_t* const* to, const Exact& exact) {
    FixedPoint fixed(job);
    for (std::int64_t first = 0; first < pixels; first += 4) {
        const std::int64_t some = pixels - first < 4 ? pixels - first : 4;
        bool is_sure = true;
        for (std::int64_t i = 0; i < count; i += kFloats) {
            const auto scale = load<Floats>(job.scaling->scale.data() + out + i);
            const auto offset = load<Floats>(job.scaling->offset.data() + out + i);
            FourIntegers found;
#pragma GCC unroll 4
            for (int p = 0; p < 4; ++p) {
                found.of[p] = fixed.of(load<Integers>(sums[first + (p < some ? p : 0)] + i), scale, offset);
            }
            is_sure &= fixed.decides(found);
            FewBytes codes[4];
            store(fixed.clamped(upper_bytes(found)), codes);
            for (std::int64_t p = 0; p < some; ++p) store_some(codes[p], count - i, to[first + p] + out + i);
        }
        if (!is_sure) exact(first, some);
    }
}

// Writes floats; `to` is each pixel's place in the first channel.
template <bool kBias, bool kNorm>
void write_floats(const LayerJob& job, std::int64_t out, std::int64_t count, std::int64_t pixels,
                  const std::int32_t (*sums)[kOuts], float* const* to) {
    const std::int64_t next = job.last ? 1 : job.height * job.width;  // from a channel to the next
    for (std::int64_t i = 0; i < count; i += kFloats) {
        const Channels<kBias, kNorm> channels(job.affine, out + i);
        for (std::int64_t p = 0; p < pixels; ++p) {
            const Floats all = channels.of(sums[p] + i);
            float* const first = to[p] + (out + i) * next;
            if (next == 1 && i + kFloats <= count) {
                store(all, first);
            } else {
                for (std::int64_t j = 0; j < kFloats && i + j < count; ++j) first[j * next] = all[j];
            }
        }
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
