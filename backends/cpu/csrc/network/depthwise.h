// Sums of a depthwise window.
#pragma once

#include "network/network_isa.h"
#include "network/widen.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr std::int64_t kMostTaps = 9;  // whose integers fit into registers

// Adds some taps for kOuts channels of each pixel; `inputs` is what the first tap reads for the first of these channels.
// Reads the integers once for all pixels.
template <int kTaps>
void add_taps(const LayerJob& job, std::int64_t first, std::int64_t channel, std::int64_t pixels,
              const std::uint8_t* const* inputs, std::int32_t (*sums)[kOuts]) {
    const Window& window = job.layer->window();
    const auto* integers = reinterpret_cast<const std::int8_t*>(job.layer->packed());
    for (std::int64_t i = 0; i < kOuts; i += kFloats) {
        Integers weights[kTaps];
        std::int64_t offsets[kTaps];
#pragma GCC unroll 9
        for (int t = 0; t < kTaps; ++t) {
            const std::int64_t y = (first + t) / window.width, x = (first + t) % window.width;
            weights[t] = widened<std::int8_t>(integers + (first + t) * job.layer->outs() + channel + i);
            offsets[t] = y * window.dilation_y * job.from.row() + x * window.dilation_x * job.from.stride + channel + i;
        }
        for (std::int64_t p = 0; p < pixels; ++p) {
            Integers sum = load<Integers>(sums[p] + i);
#pragma GCC unroll 9
            for (int t = 0; t < kTaps; ++t) sum += widened<std::uint8_t>(inputs[p] + offsets[t]) * weights[t];
            store(sum, sums[p] + i);
        }
    }
}

inline void depthwise_sums(const LayerJob& job, std::int64_t channel, std::int64_t pixels,
                           const std::uint8_t* const* inputs, std::int32_t (*sums)[kOuts]) {
    __builtin_memset(sums, 0, pixels * sizeof(*sums));
    const std::int64_t taps = job.layer->window().taps();
    std::int64_t first = 0;
    for (; first + kMostTaps <= taps; first += kMostTaps) {
        add_taps<kMostTaps>(job, first, channel, pixels, inputs, sums);
    }
    for (; first < taps; ++first) add_taps<1>(job, first, channel, pixels, inputs, sums);
}

}  // namespace nmcompile::NMCOMPILE_ISA
