// One convolution of floats in integers: the steps that a program has for it, on images that live for one call.

#include "network/convolution_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>

#include "machine/spare_memory.h"
#include "network/layer_operands.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Floats = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using NewFloats = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;
using Four = std::array<std::int64_t, 4>;

template <class Array>
Four sizes(const Array& x) {
    return {static_cast<std::int64_t>(x.shape(0)), static_cast<std::int64_t>(x.shape(1)),
            static_cast<std::int64_t>(x.shape(2)), static_cast<std::int64_t>(x.shape(3))};
}

// Returns whether elements lie side by side if one goes through the dims in this order, the last one fastest.
template <class Array>
bool lies_in(const Array& x, std::array<int, 4> order) {
    std::int64_t next = 1;
    for (int i = 3; i >= 0; --i) {
        const int dim = order[i];
        if (x.shape(dim) != 1 && x.stride(dim) != next) return false;
        next *= static_cast<std::int64_t>(x.shape(dim));
    }
    return true;
}

template <class Array>
bool is_channels_last(const Array& x) {
    if (lies_in(x, {0, 1, 2, 3})) return false;
    require(lies_in(x, {0, 2, 3, 1}), "images are contiguous, or channels last");
    return true;
}

Image image_of(const Four& x, Two padding, int fill) {
    require(*std::min_element(x.begin(), x.end()) > 0, "there is no image");
    require(std::min(padding[0], padding[1]) >= 0, "the padding is negative");
    const Image image{0, x[0], x[2], x[3], x[1], padding[0], padding[1], fill, x[1]};
    require_size(image);
    return image;
}

bool convolve(const SharedLayer& layer, const Floats& x, float step, int low, int high, bool exact, bool prunes,
              Two padding, const Column& steps, const Column& bias, const NewFloats& y, const char* isa,
              unsigned threads) {
    const int most = layer->form() == Form::sparse ? kMostSparseCode : kCodes - 1;
    require(step > 0 && low <= 0 && low > -kCodes && high >= 0 && high < kCodes && high - low <= most,
            "the grid is none of the layer's codes");
    const Image image = image_of(sizes(x), padding, -low);
    require(!prunes || (low == 0 && high <= kMostSparseCode && image.channels % 8 == 0),
            "pruned are codes of four bits from zero on, eight channels at a time");
    FloatLayer product;
    read_image(product, layer, image, -low, padding);
    require(sizes(y) == Four{image.samples, layer->outs(), product.height, product.width},
            "the result has another size");
    require(steps.is_valid(), "a layer has steps");
    product.steps = factors(steps, layer->outs());
    product.bias = factors(bias, layer->outs());
    product.slot = 1;
    product.last = is_channels_last(y);
    Encode code(0, image, step, low, high);
    code.last = is_channels_last(x);
    code.exact = exact;
    code.prunes = prunes;
    const Kernels& kernels = network_kernels(instruction_set(isa));
    const std::vector<float*> slots{const_cast<float*>(x.data()), y.data()};  // the first is read
    nb::gil_scoped_release release;
    const Memory codes(static_cast<std::size_t>(image.bytes() + kSlack), Excess::any);
    const Run run{static_cast<std::uint8_t*>(codes.data()), slots, kernels, threads};
    return code.run(run) && product.run(run);
}

}  // namespace

void bind_convolution(nb::module_& m) {
    m.attr("INTEGER_LAYER_DEPTH") = kMostIntegers;
    m.def("convolve_integers", &convolve, "layer"_a, "x"_a.noconvert(), "step"_a, "low"_a, "high"_a, "exact"_a,
          "prunes"_a, "padding"_a, "steps"_a.noconvert(), "bias"_a.noconvert().none(), "y"_a.noconvert(), "isa"_a,
          "threads"_a,
          "Write a convolution of images, coded on the grid of `step`, to `y`; False if a value is a NaN or, if `exact`,"
          " is no whole step in [low, high].");
}

}  // namespace nmcompile
