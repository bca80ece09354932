// Operands of a layer from Python, checked.
#pragma once

#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>

#include "network/steps.h"

namespace nmcompile {

using Column =
    nanobind::ndarray<const float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;  // of out-channels
using Two = std::array<std::int64_t, 2>;  // of height and width
using SharedLayer = std::shared_ptr<IntegerLayer>;

constexpr std::int64_t kMostExtent = std::int64_t{1} << 31;  // of a window, a stride or a dilation
constexpr double kMostBytes = std::int64_t{1} << 46;         // of an image

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// Refuses an image whose bytes may not be counted by an integer.
inline void require_size(const Image& image) {
    const auto padded = [](std::int64_t size, std::int64_t halo) {
        return static_cast<double>(size) + 2.0 * static_cast<double>(halo);
    };
    const double pixels =
        static_cast<double>(image.samples) * padded(image.height, image.halo_y) * padded(image.width, image.halo_x);
    require(pixels * static_cast<double>(image.stride) < kMostBytes, "the image is too large");
}

inline Factors factors(const Column& column, std::int64_t count) {
    if (!column.is_valid()) return {};
    require(static_cast<std::int64_t>(column.shape(0)) == count, "a layer has a factor for each out-channel");
    Factors result(count + kOuts);  // kernels read whole blocks
    std::copy_n(column.data(), count, result.data());
    return result;
}

// Makes a step read an image, in which `zero` is the code of zero; finds the size of the result.
inline void read_image(Layer& step, const SharedLayer& layer, const Image& image, std::int32_t zero, Two padding) {
    const Window& window = layer->window();
    const auto extent = [](std::int64_t size, std::int64_t pad, std::int64_t taps, std::int64_t stride,
                           std::int64_t gap) {
        const std::int64_t rest = size + 2 * pad - 1 - gap * (taps - 1);
        require(rest >= 0, "the window is larger than the image");
        return rest / stride + 1;
    };
    require(image.channels == layer->channels(), "the image's channels are not the layer's");
    require(std::min(padding[0], padding[1]) >= 0 && padding[0] <= image.halo_y && padding[1] <= image.halo_x,
            "the halo is narrower than the padding");
    step.layer = layer;
    step.from = image;
    step.zero = zero;
    step.pad_y = padding[0];
    step.pad_x = padding[1];
    step.height = extent(image.height, padding[0], window.height, window.stride_y, window.dilation_y);
    step.width = extent(image.width, padding[1], window.width, window.stride_x, window.dilation_x);
}

}  // namespace nmcompile
