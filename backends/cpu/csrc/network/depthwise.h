// Sums of a depthwise window: kOuts channels of one pixel at a time.
#pragma once

#include "network/network_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

// `input` is what the first tap reads for channel `from`; writes `count` sums, up to kOuts.
inline void depthwise_sums(const LayerJob& job, const std::uint8_t* input, std::int64_t from, std::int64_t count,
                           std::int32_t* sums) {
    const Window& window = job.layer->window();
    const auto* integers = reinterpret_cast<const std::int8_t*>(job.layer->packed()) + from;
    for (std::int64_t i = 0; i < kOuts; ++i) sums[i] = 0;
    for (std::int64_t y = 0; y < window.height; ++y) {
        for (std::int64_t x = 0; x < window.width; ++x, integers += job.layer->outs()) {
            const std::uint8_t* const codes =
                input + y * window.dilation_y * job.from.row() + x * window.dilation_x * job.from.stride;
            if (count == kOuts) {
                for (std::int64_t i = 0; i < kOuts; ++i) sums[i] += codes[i] * integers[i];
            } else {
                for (std::int64_t i = 0; i < count; ++i) sums[i] += codes[i] * integers[i];
            }
        }
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
