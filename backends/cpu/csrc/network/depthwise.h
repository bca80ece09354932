// Sums of a depthwise window: kChunk out-channels for the pixels of a tile.
#pragma once

#include "network/network_isa.h"
#include "network/widen.h"

namespace nmcompile::NMCOMPILE_ISA {

// Returns what the sums of some channels start with: minus the code of zero times the integers.
inline Integers start_of(const LayerJob& job, std::int64_t channel) {
    return load<Integers>(job.affine.sums + channel) * -job.affine.zero;
}

// Some taps of a window. Their integers are read once for all pixels.
struct Taps {
    static constexpr int kMost = 12;
    int count;
    std::int64_t offsets[kMost];           // from the first tap
    const std::uint8_t* integers[kMost];   // of all channels

    Taps(const LayerJob& job, std::int64_t first) {
        const Window& window = job.layer->window();
        const std::int64_t rest = window.taps() - first;
        count = static_cast<int>(rest < kMost ? rest : kMost);
        for (int t = 0; t < count; ++t) {
            const std::int64_t y = (first + t) / window.width, x = (first + t) % window.width;
            offsets[t] = y * window.dilation_y * job.from.row() + x * window.dilation_x * job.from.stride;
            integers[t] = job.layer->packed() + (first + t) * job.layer->outs();
        }
    }
};

#if defined(__AVX512VNNI__)
constexpr std::int64_t kChunk = 4 * kOuts;

struct Four {
    __m512i of[4];
};

// Brings four bytes of each channel side by side; of each sixteen channels, four come into each vector.
inline Four side_by_side(const Four& x) {
    const __m512i first = _mm512_unpacklo_epi8(x.of[0], x.of[1]), second = _mm512_unpackhi_epi8(x.of[0], x.of[1]);
    const __m512i third = _mm512_unpacklo_epi8(x.of[2], x.of[3]), fourth = _mm512_unpackhi_epi8(x.of[2], x.of[3]);
    return {{_mm512_unpacklo_epi16(first, third), _mm512_unpackhi_epi16(first, third),
             _mm512_unpacklo_epi16(second, fourth), _mm512_unpackhi_epi16(second, fourth)}};
}

// Brings the sums into the order of channels.
inline Four in_order(const Four& x) {
    const __m512i first = _mm512_shuffle_i32x4(x.of[0], x.of[1], 0x44), second = _mm512_shuffle_i32x4(x.of[0], x.of[1], 0xEE);
    const __m512i third = _mm512_shuffle_i32x4(x.of[2], x.of[3], 0x44), fourth = _mm512_shuffle_i32x4(x.of[2], x.of[3], 0xEE);
    return {{_mm512_shuffle_i32x4(first, third, 0x88), _mm512_shuffle_i32x4(first, third, 0xDD),
             _mm512_shuffle_i32x4(second, fourth, 0x88), _mm512_shuffle_i32x4(second, fourth, 0xDD)}};
}

// Some taps for the pixels of a tile, four of them with an instruction.
template <int kFours>
struct Columns {
    Four weights[kFours];
    std::int64_t offsets[4 * kFours];

    Columns(const Taps& taps, std::int64_t channel) {
#pragma GCC unroll 3
        for (int f = 0; f < kFours; ++f) {
            Four read;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int tap = 4 * f + i;
                offsets[tap] = channel + taps.offsets[tap < taps.count ? tap : 0];
                read.of[i] = tap < taps.count ? _mm512_loadu_si512(taps.integers[tap] + channel) : _mm512_setzero_si512();
            }
            weights[f] = side_by_side(read);
        }
    }

    // Returns the sums of a pixel in the order of `side_by_side`, added to others.
    Four sums(const std::uint8_t* input, Four all) const {
#pragma GCC unroll 3
        for (int f = 0; f < kFours; ++f) {
            Four read;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) read.of[i] = _mm512_loadu_si512(input + offsets[4 * f + i]);
            const Four codes = side_by_side(read);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) all.of[i] = _mm512_dpbusd_epi32(all.of[i], codes.of[i], weights[f].of[i]);
        }
        return all;
    }
};

// Calls `work` with the columns of so many taps.
template <class Work>
inline void with_columns(const Taps& taps, std::int64_t channel, const Work& work) {
    if (taps.count > 8) return work(Columns<3>(taps, channel));
    if (taps.count > 4) return work(Columns<2>(taps, channel));
    work(Columns<1>(taps, channel));
}

inline void add_taps(const Taps& taps, std::int64_t channel, std::int64_t pixels, const std::uint8_t* const* inputs,
                     std::int32_t (*sums)[kTilePixels][kOuts]) {
    with_columns(taps, channel, [&](const auto& columns) {
        for (std::int64_t p = 0; p < pixels; ++p) {
            const Four found = in_order(columns.sums(inputs[p], {}));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                _mm512_storeu_si512(sums[i][p], _mm512_add_epi32(_mm512_loadu_si512(sums[i][p]), found.of[i]));
            }
        }
    });
}
#else
constexpr std::int64_t kChunk = kOuts;

inline void add_taps(const Taps& taps, std::int64_t channel, std::int64_t pixels, const std::uint8_t* const* inputs,
                     std::int32_t (*sums)[kTilePixels][kOuts]) {
    for (std::int64_t i = 0; i < kOuts; i += kFloats) {
        Integers weights[Taps::kMost];
        for (int t = 0; t < taps.count; ++t) weights[t] = widened<std::int8_t>(taps.integers[t] + channel + i);
        for (std::int64_t p = 0; p < pixels; ++p) {
            Integers sum = load<Integers>(sums[0][p] + i);
            for (int t = 0; t < taps.count; ++t) {
                sum += widened<std::uint8_t>(inputs[p] + taps.offsets[t] + channel + i) * weights[t];
            }
            store(sum, sums[0][p] + i);
        }
    }
}
#endif

// Computes kChunk channels from `channel` on, kOuts of them in each of `sums`; sums behind the last channel mean nothing.
// `inputs` is what the first tap reads for each pixel.
inline void depthwise_sums(const LayerJob& job, std::int64_t channel, std::int64_t pixels,
                           const std::uint8_t* const* inputs, std::int32_t (*sums)[kTilePixels][kOuts]) {
    for (std::int64_t i = 0; i < kChunk; i += kFloats) {
        const Integers start = start_of(job, channel + i);
        for (std::int64_t p = 0; p < pixels; ++p) store(start, sums[i / kOuts][p] + i % kOuts);
    }
    for (std::int64_t first = 0; first < job.layer->window().taps(); first += Taps::kMost) {
        add_taps(Taps(job, first), channel, pixels, inputs, sums);
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
