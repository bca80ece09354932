// Images of codes: uint8, samples x height x width x channels, with a halo of the code of zero around each sample.
#pragma once

#include <cstdint>

namespace nmcompile {

struct Image {
    std::int64_t offset;          // of the first byte, halo included, in the arena of its program
    std::int64_t samples, height, width, channels;
    std::int64_t halo_y, halo_x;  // pixels on each side
    std::int64_t fill;            // what the halo holds
    std::int64_t stride;          // bytes from a pixel to the next: more than channels in a slice of a concatenation

    std::int64_t row() const { return (width + 2 * halo_x) * stride; }
    std::int64_t sample() const { return (height + 2 * halo_y) * row(); }
    std::int64_t bytes() const { return samples * sample() - (stride - channels); }
    std::int64_t pixels() const { return samples * height * width; }

    // Returns the offset of a pixel, which may lie in the halo.
    std::int64_t at(std::int64_t n, std::int64_t y, std::int64_t x) const {
        return offset + n * sample() + (y + halo_y) * row() + (x + halo_x) * stride;
    }
};

// Calls `work(number, count, sample, y, x)` for the runs in a row among pixels that follow each other, from the one that
// starts with the first of them on.
template <class Work>
inline void for_runs(std::int64_t pixel, std::int64_t pixels, std::int64_t height, std::int64_t width, const Work& work) {
    std::int64_t sample = pixel / (height * width), y = pixel / width % height, x = pixel % width;
    for (std::int64_t number = 0; number < pixels; x = 0) {
        const std::int64_t rest = pixels - number, count = rest < width - x ? rest : width - x;
        work(number, count, sample, y, x);
        number += count;
        if (++y == height) y = 0, ++sample;
    }
}

}  // namespace nmcompile
