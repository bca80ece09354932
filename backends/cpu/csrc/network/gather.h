// Gathers what the taps of a window read for some pixels of the result: a row of depth for each pixel, or for each pair of
// pixels with two codes of four bits in a byte.
#pragma once

#include "machine/lanes.h"
#include "network/network_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kCopied = NMCOMPILE_VECTOR_BYTES;
using Copied = Vector<std::uint8_t, kCopied>;

// Both read and write whole vectors, up to kSlack bytes too many; rows are written in rising order.
inline void copy_run(const std::uint8_t* from, std::int64_t count, std::uint8_t* to) {
    for (std::int64_t i = 0; i < count; i += kCopied) store(load<Copied>(from + i), to + i);
}

inline void pair_run(const std::uint8_t* first, const std::uint8_t* second, std::int64_t count, std::uint8_t* to) {
    using Wide = Vector<std::uint16_t, kCopied / 2>;  // shifts of bytes, as no upper half holds anything
    for (std::int64_t i = 0; i < count; i += kCopied) {
        const Wide upper = load<Wide>(second + i) << 4;
        store(load<Wide>(first + i) | upper, to + i);
    }
}

class Gather {
public:
    explicit Gather(const LayerJob& job, std::int64_t group) : job_(job), window_(job.layer->window()) {
        const Image& from = job.from;
        const std::int64_t ins = job.layer->group_ins();
        // Neighbours in a row of the image are neighbours in the depth, unless channels lie between them.
        const bool is_joined = window_.dilation_x == 1 && ins == from.stride;
        run_ = is_joined ? window_.width * ins : ins;
        runs_ = is_joined ? 1 : window_.width;
        start_ = job.input + from.at(0, -job.pad_y, -job.pad_x) + group * ins;
    }

    std::int64_t depth() const { return window_.height * runs_ * run_; }

    void pixel(const std::uint8_t* from, std::uint8_t* to) const {
        for (std::int64_t y = 0; y < window_.height; ++y) {
            for (std::int64_t x = 0; x < runs_; ++x, to += run_) copy_run(from + offset(y, x), run_, to);
        }
    }

    void pair(const std::uint8_t* a, const std::uint8_t* b, std::uint8_t* to) const {
        for (std::int64_t y = 0; y < window_.height; ++y) {
            for (std::int64_t x = 0; x < runs_; ++x, to += run_) pair_run(a + offset(y, x), b + offset(y, x), run_, to);
        }
    }

    // Finds what the first tap reads for each pixel of an extent.
    void find(const Extent& extent, const std::uint8_t** firsts) const {
        const Image& from = job_.from;
        const std::int64_t step = window_.stride_x * from.stride;
        for_runs(extent.pixel, extent.pixels, job_.height, job_.width, [&](auto number, auto count, auto n, auto y, auto x) {
            const std::uint8_t* const first = start_ + n * from.sample() + y * window_.stride_y * from.row() + x * step;
            for (std::int64_t i = 0; i < count; ++i) firsts[number + i] = first + i * step;
        });
    }

private:
    std::int64_t offset(std::int64_t y, std::int64_t x) const {
        return y * window_.dilation_y * job_.from.row() + x * window_.dilation_x * job_.from.stride;
    }

    const LayerJob& job_;
    const Window& window_;
    std::int64_t run_, runs_;
    const std::uint8_t* start_;
};

}  // namespace nmcompile::NMCOMPILE_ISA
