// Codes of floats, and images of them: channels lie side by side in an image, and pixels in floats that come channels
// first.
#pragma once

#include "machine/lanes.h"
#include "network/code_maps.h"
#include "network/epilogue.h"
#include "network/network_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kSquare = 16;
using Side = Vector<std::uint8_t, kSquare>;

// Writes codes side by side; returns whether none is a NaN and, if `kExact`, all are on the grid.
template <bool kExact>
bool encode_run(const EncodeJob& job, const float* x, std::int64_t count, std::uint8_t* codes) {
    const float step = job.step, least = static_cast<float>(job.low), most = static_cast<float>(job.high);
    const int low = job.low;  // a copy, which no code overwrites
    int strangers = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        float steps = x[i] / step;
        if constexpr (!kExact) strangers += steps != steps;
        steps = steps > least ? steps : least;  // a NaN too
        steps = steps < most ? steps : most;
        const float nearest = steps + kRound - kRound;
        if constexpr (kExact) strangers += nearest * step != x[i];
        codes[i] = static_cast<std::uint8_t>(static_cast<int>(nearest) - low);
    }
    return strangers == 0;
}

// Transposes: each round turns the eight bits of row and column by one.
inline void transpose(Side (&square)[kSquare]) {
    for (int round = 0; round < 4; ++round) {
        Side turned[kSquare];
        for (int i = 0; i < kSquare / 2; ++i) {
            const Pair<Side> both = zip(square[i], square[i + kSquare / 2]);
            turned[2 * i] = both.first;
            turned[2 * i + 1] = both.second;
        }
        for (int i = 0; i < kSquare; ++i) square[i] = turned[i];
    }
}

// The pixels of a sample from `first` on, up to kEncoded of them.
struct Encoded {
    std::int64_t count;
    std::uint8_t* pixels[kEncoded];

    Encoded(const EncodeJob& job, std::int64_t sample, std::int64_t first) {
        const Image& to = job.to;
        const std::int64_t rest = to.height * to.width - first;
        count = rest < kEncoded ? rest : kEncoded;
        nmcompile::for_runs(first, count, to.height, to.width, [&](auto number, auto some, auto, auto y, auto x) {
            std::uint8_t* const codes = job.output + to.at(sample, y, x);
            for (std::int64_t i = 0; i < some; ++i) pixels[number + i] = codes + i * to.stride;
        });
    }

    // Calls `work(first, pixels)` for runs of pixels with no gap between their codes.
    template <class Work>
    void for_joined(std::int64_t channels, const Work& work) const {
        for (std::int64_t p = 0, next = 1; p < count; p = next++) {
            while (next < count && pixels[next] == pixels[next - 1] + channels) ++next;
            work(p, next - p);
        }
    }
};

template <bool kExact>
bool encode_channels_last(const EncodeJob& job, const float* x, const Encoded& to) {
    const std::int64_t channels = job.to.channels;
    bool fits = true;
    to.for_joined(channels, [&](std::int64_t first, std::int64_t pixels) {
        fits &= encode_run<kExact>(job, x + first * channels, pixels * channels, to.pixels[first]);
    });
    return fits;
}

// `x` is the first of the pixels in the first channel.
template <bool kExact>
bool encode_channels_first(const EncodeJob& job, const float* x, const Encoded& to) {
    const std::int64_t channels = job.to.channels, area = job.to.height * job.to.width;
    std::uint8_t rows[kSquare][kEncoded] = {};
    bool fits = true;
    for (std::int64_t c = 0; c < channels; c += kSquare) {
        const std::int64_t some = channels - c < kSquare ? channels - c : kSquare;
        for (std::int64_t i = 0; i < some; ++i) fits &= encode_run<kExact>(job, x + (c + i) * area, to.count, rows[i]);
        for (std::int64_t p = 0; p < to.count; p += kSquare) {
            Side square[kSquare];
            for (int i = 0; i < kSquare; ++i) square[i] = load<Side>(rows[i] + p);
            transpose(square);
            for (std::int64_t i = 0; i < kSquare && p + i < to.count; ++i) {
                std::uint8_t* const codes = to.pixels[p + i] + c;
                if (some == kSquare) {
                    store(square[i], codes);
                } else {
                    __builtin_memcpy(codes, &square[i], static_cast<std::size_t>(some));
                }
            }
        }
    }
    return fits;
}

template <bool kExact>
bool encode_as(const EncodeJob& job, std::int64_t sample, std::int64_t first) {
    const Encoded to(job, sample, first);
    const std::int64_t channels = job.to.channels, area = job.to.height * job.to.width;
    const float* const x = job.x + sample * channels * area;
    const bool fits = job.last ? encode_channels_last<kExact>(job, x + first * channels, to)
                               : encode_channels_first<kExact>(job, x + first, to);
    if (job.prunes) {
        to.for_joined(channels, [&](std::int64_t p, std::int64_t pixels) { prune(to.pixels[p], pixels * channels); });
    }
    return fits;
}

inline bool encode(const EncodeJob& job, std::int64_t sample, std::int64_t first) {
    return job.exact ? encode_as<true>(job, sample, first) : encode_as<false>(job, sample, first);
}

}  // namespace nmcompile::NMCOMPILE_ISA
