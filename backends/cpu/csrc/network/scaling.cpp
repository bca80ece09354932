#include "network/scaling.h"

#include <algorithm>
#include <cmath>

namespace nmcompile {
namespace {

constexpr double kUnit = 0x1p-24;    // rounding of a float32 operation, of its result
constexpr double kExact = 0x1p24;    // integers up to it are floats
constexpr double kSafety = 1.01;     // roundings of what is rounded, and of this bound
constexpr double kOne = 0x1p16;      // of the fixed point
constexpr double kMostMargin = 0.05 * kOne;
constexpr double kMostResult = 0x1p14;  // in magnitude, so that it fits into the upper half
constexpr std::int64_t kRead = kBlock;  // channels that a kernel may read behind the last

// One out-channel in steps of the codes.
class Channel {
public:
    Channel(const IntegerLayer& layer, const Affine& by, const Grid& grid, std::int64_t out)
        : has_bias_(by.bias != nullptr), has_norm_(by.gain != nullptr) {
        const double gain = has_norm_ ? by.gain[out] : 1;
        scale = by.steps[out] * gain / grid.step;
        bias_ = has_bias_ ? by.bias[out] * gain / grid.step : 0;
        shift_ = has_norm_ ? by.shift[out] / grid.step : 0;
        offset = bias_ + shift_ - grid.low;
        inside_ = std::max(std::abs(grid.low), std::abs(grid.high)) + 1;
        most_ = (layer.most() + std::abs(double(by.zero))) * layer.magnitudes()[out];
    }

    // Returns how far a result may lie from the grid's lowest code.
    double farthest() const { return most_ * std::abs(scale) + added(); }

    // Returns how far both numbers may lie apart if they are no larger than `result`: by the rounding of each operation.
    // The sums are no larger than the result and what is added to them. Results beyond the grid may be further apart,
    // but by less than 1/2, as `farthest` is bounded, so they stay there.
    double margin(double result) const {
        const double sums = result + std::abs(bias_) + std::abs(shift_);
        const double converted = most_ > kExact ? 2 * sums : 0;
        const double with_bias = has_bias_ ? sums + std::abs(bias_) : 0;
        const double with_norm = has_norm_ ? sums + std::abs(bias_) + result : 0;
        const double in_module = sums + with_bias + with_norm + result;
        const double here = 2 * sums + added() + result + inside_;
        return kSafety * kUnit * (converted + in_module + here);
    }

    double inside() const { return inside_; }

    double scale, offset;

private:
    double added() const { return std::abs(bias_) + std::abs(shift_) + inside_; }

    bool has_bias_, has_norm_;
    double bias_, shift_, inside_, most_;
};

}  // namespace

Scaling scaling_of(const IntegerLayer& layer, const Affine& affine, const Grid& grid) {
    std::vector<Channel> channels;
    double least = 0, largest = 0;
    for (std::int64_t out = 0; out < layer.outs(); ++out) {
        const Channel& channel = channels.emplace_back(layer, affine, grid, out);
        if (!(channel.farthest() < kMostResult)) return {};  // nor if it is no number
        least = std::max(least, channel.margin(1) * kOne + 1);  // and the fixed point's own rounding
        largest = std::max(largest, channel.margin(channel.inside()) * kOne + 1);
    }
    const double margin = std::ceil(largest);
    if (margin > kMostMargin) return {};
    const double most = channels.empty() ? 1 : channels[0].inside() - 1;
    const std::size_t count = layer.outs() + kRead;
    Scaling result{std::vector<float>(count), std::vector<float>(count, kOne / 2), static_cast<std::int32_t>(margin),
                   static_cast<float>(least), static_cast<float>((largest - least) / most)};
    for (std::int64_t out = 0; out < layer.outs(); ++out) {
        result.scale[out] = static_cast<float>(channels[out].scale * kOne);
        result.offset[out] = static_cast<float>((channels[out].offset + 0.5) * kOne + margin);
    }
    return result;
}

}  // namespace nmcompile
