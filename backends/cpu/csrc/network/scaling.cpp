#include "network/scaling.h"

#include <algorithm>
#include <cmath>

namespace nmcompile {
namespace {

constexpr double kUnit = 0x1p-24;    // rounding of a float32 operation, of its result
constexpr double kRoundings = 16;    // more than there are in both forms of a code, each weighted by its operand
constexpr double kMostMargin = 0.05;
constexpr std::int64_t kRead = kBlock;  // channels that a kernel may read behind the last

// One out-channel in steps of the codes.
struct Channel {
    double scale, offset;
    double margin;    // of a code inside the grid
    double farthest;  // the margin of any code; outside the grid it must only stay there

    Channel(const IntegerLayer& layer, const Affine& by, const Grid& grid, std::int64_t out) {
        const double gain = by.gain ? by.gain[out] : 1, bias = by.bias ? by.bias[out] : 0;
        const double shift = by.shift ? by.shift[out] : 0, zero = by.zero;
        scale = by.steps[out] * gain / grid.step;
        const double zeros = zero * by.sums[out] * scale;
        offset = (bias * gain + shift) / grid.step - zeros - grid.low;
        const double added = (std::abs(bias * gain) + std::abs(shift)) / grid.step + std::abs(zeros);
        const double inside = std::max(std::abs(grid.low), std::abs(grid.high)) + 1;
        const double sums = (layer.most() + std::abs(zero)) * layer.magnitudes()[out] * std::abs(scale);
        margin = kRoundings * kUnit * (inside + added);
        farthest = kRoundings * kUnit * (inside + added + sums);
    }
};

}  // namespace

Scaling scaling_of(const IntegerLayer& layer, const Affine& affine, const Grid& grid) {
    Scaling result{std::vector<float>(layer.outs() + kRead), std::vector<float>(layer.outs() + kRead)};
    double margin = 0, farthest = 0;
    for (std::int64_t out = 0; out < layer.outs(); ++out) {
        const Channel channel(layer, affine, grid, out);
        if (!std::isfinite(channel.farthest)) return result;
        result.scale[out] = static_cast<float>(channel.scale);
        result.offset[out] = static_cast<float>(channel.offset);
        margin = std::max(margin, channel.margin);
        farthest = std::max(farthest, channel.farthest);
    }
    if (margin < kMostMargin && farthest < 0.25) result.limit = static_cast<float>(0.5 - margin);
    return result;
}

}  // namespace nmcompile
