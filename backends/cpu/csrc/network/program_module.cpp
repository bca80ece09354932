// Python interface of programs: checks that operands fit each other and images lie in the arena.

#include "network/program_module.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "network/layer_operands.h"
#include "network/steps.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Weights = nb::ndarray<const std::int8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Eight = std::array<std::int64_t, 8>;

Window window_of(Two size, Two stride, Two dilation) {
    require(std::min({size[0], size[1], stride[0], stride[1], dilation[0], dilation[1]}) > 0, "a window has no extent");
    require(std::max({size[0], size[1], stride[0], stride[1], dilation[0], dilation[1]}) < kMostExtent,
            "the window is too large");
    return {size[0], size[1], stride[0], stride[1], dilation[0], dilation[1]};
}

SharedLayer new_layer(const Weights& weights, std::int64_t groups, Two stride, Two dilation, int most) {
    const auto size = [&](int dim) { return static_cast<std::int64_t>(weights.shape(dim)); };
    const Window window = window_of({size(1), size(2)}, stride, dilation);
    require(groups > 0 && size(0) % groups == 0 && size(3) > 0, "the groups do not divide the out-channels");
    require(most > 0 && most < kCodes, "codes are from 1 to 255");
    require(window.taps() * size(3) < kMostIntegers, "the depth is too large for sums of 32 bits");
    nb::gil_scoped_release release;
    return std::make_shared<IntegerLayer>(weights.data(), size(0), size(3), groups, window, most);
}

Image image_in(const Program& program, const Eight& x) {
    const Image image{x[0], x[1], x[2], x[3], x[4], x[5], x[5], x[6], x[7]};
    const bool is_sound = std::min({x[1], x[2], x[3], x[4]}) > 0 && x[0] >= 0 && x[5] >= 0 && image.fill >= 0 &&
                          image.fill < kCodes && image.stride >= image.channels;
    require(is_sound && image.offset <= program.bytes(), "an image does not lie in the arena");
    require_size(image);
    require(image.offset + image.bytes() <= program.bytes(), "an image does not lie in the arena");
    return image;
}

bool are_alike(const Image& a, const Image& b) {
    return a.samples == b.samples && a.height == b.height && a.width == b.width && a.channels == b.channels;
}

Table table_of(const Codes& codes) {
    if (!codes.is_valid()) return {};
    require(codes.shape(0) == kCodes, "a table has 256 codes");
    return Table(codes.data(), codes.data() + kCodes);
}

// Four largest of eight are found by keys that hold codes of four bits.
void check_pruning(bool prunes, const Table& table, int most, std::int64_t channels) {
    if (!prunes) return;
    if (!table.empty()) most = *std::max_element(table.begin(), table.end());
    require(channels % 8 == 0 && most <= kMostSparseCode, "pruned are codes of four bits, eight channels at a time");
}

int slot_of(Program& program, int slot) {
    require(slot >= 0, "a slot has a number from 0 on");
    program.use_slot(static_cast<std::size_t>(slot));
    return slot;
}

template <class AnyLayer>
std::unique_ptr<AnyLayer> layer_on(const Program& program, const SharedLayer& layer, const Eight& from, std::int32_t zero,
                                   Two padding, const Column& steps, const Column& bias, const Column& gain,
                                   const Column& shift) {
    auto step = std::make_unique<AnyLayer>();
    read_image(*step, layer, image_in(program, from), zero, padding);
    require(steps.is_valid() && gain.is_valid() == shift.is_valid(), "a layer has steps, and a norm a gain and a shift");
    step->steps = factors(steps, layer->outs());
    step->bias = factors(bias, layer->outs());
    step->gain = factors(gain, layer->outs());
    step->shift = factors(shift, layer->outs());
    return step;
}

void add_layer(Program& program, const SharedLayer& layer, Eight from, Eight to, std::int32_t zero, Two padding,
               const Column& steps, const Column& bias, const Column& gain, const Column& shift, float out_step, int low,
               int high, const Codes& table, bool prunes) {
    auto step = layer_on<CodedLayer>(program, layer, from, zero, padding, steps, bias, gain, shift);
    step->to = image_in(program, to);
    require(are_alike(step->to, {0, step->from.samples, step->height, step->width, layer->outs(), 0, 0, 0, 0}),
            "the image of the result has another size");
    require(out_step > 0 && low <= high && high - low < kCodes, "the grid of the result is none of bytes");
    step->grid = {out_step, low, high};
    step->scaling = scaling_of(*layer, step->affine(), step->grid);
    step->table = table_of(table);
    step->prunes = prunes;
    check_pruning(prunes, step->table, high - low, layer->outs());
    program.add(std::move(step));
}

void add_float_layer(Program& program, const SharedLayer& layer, Eight from, int slot, std::int32_t zero, Two padding,
                     const Column& steps, const Column& bias, const Column& gain, const Column& shift) {
    auto step = layer_on<FloatLayer>(program, layer, from, zero, padding, steps, bias, gain, shift);
    step->slot = slot_of(program, slot);
    program.add(std::move(step));
}

void add_encode(Program& program, int slot, Eight to, float step, int low, int high) {
    require(step > 0 && low <= high && high - low < kCodes, "the grid is none of bytes");
    program.add(std::make_unique<Encode>(slot_of(program, slot), image_in(program, to), step, low, high));
}

void add_decode(Program& program, Eight from, int slot, const Column& values) {
    require(values.shape(0) == kCodes, "a table has 256 values");
    Factors all(values.data(), values.data() + kCodes);
    program.add(std::make_unique<Decode>(image_in(program, from), slot_of(program, slot), std::move(all)));
}

void add_recode(Program& program, Eight from, Eight to, const Codes& table, bool prunes) {
    const Image source = image_in(program, from), result = image_in(program, to);
    require(are_alike(source, result), "the images have different sizes");
    Table codes = table_of(table);
    check_pruning(prunes, codes, 0, result.channels);
    program.add(std::make_unique<Recode>(source, result, std::move(codes), prunes));
}

void add_flatten(Program& program, Eight from, Eight to, const Codes& table, bool prunes) {
    const Image source = image_in(program, from), result = image_in(program, to);
    const bool fits = result.samples == source.samples && result.height == 1 && result.width == 1 &&
                      result.channels == source.height * source.width * source.channels;
    require(fits, "the images have different sizes");
    Table codes = table_of(table);
    check_pruning(prunes, codes, 0, result.channels);
    program.add(std::make_unique<Flatten>(source, result, std::move(codes), prunes));
}

void add_sum(Program& program, Eight a, Eight b, Eight to, int offset, int low, int high) {
    const Image first = image_in(program, a), second = image_in(program, b), result = image_in(program, to);
    require(are_alike(first, result) && are_alike(second, result), "the images have different sizes");
    require(low >= 0 && low <= high && high < kCodes && offset > -1024 && offset < 1024, "the sums are no bytes");
    program.add(std::make_unique<Add>(first, second, result, offset, low, high));
}

void add_max_pool(Program& program, Eight from, Eight to, Two size, Two stride, Two padding, Two dilation) {
    const Image source = image_in(program, from), result = image_in(program, to);
    const Window window = window_of(size, stride, dilation);
    require(source.samples == result.samples && source.channels == result.channels, "the images have different sizes");
    require(padding[0] >= 0 && padding[1] >= 0 && 2 * padding[0] <= size[0] && 2 * padding[1] <= size[1],
            "the padding is wider than half of the window");
    // So each window holds a pixel.
    require((result.height - 1) * stride[0] - padding[0] < source.height &&
                (result.width - 1) * stride[1] - padding[1] < source.width,
            "a window lies outside the image");
    program.add(std::make_unique<MaxPool>(source, result, window, padding[0], padding[1]));
}

std::int64_t run_program(Program& program, std::int64_t first, std::int64_t last, const std::vector<std::uintptr_t>& slots,
                         const char* isa, unsigned threads) {
    require(first >= 0 && first <= last && last <= program.size(), "the program has no such steps");
    require(slots.size() >= program.slots(), "the program reads and writes more slots");
    const InstructionSet chosen = instruction_set(isa);
    std::vector<float*> floats;
    for (const std::uintptr_t slot : slots) floats.push_back(reinterpret_cast<float*>(slot));
    nb::gil_scoped_release release;
    return program.run(first, last, floats, chosen, threads);
}

}  // namespace

void bind_network(nb::module_& m) {
    nb::class_<IntegerLayer>(m, "IntegerLayer", "The integers of a convolution, packed.")
        .def_prop_ro("form", [](const IntegerLayer& layer) { return kFormNames[static_cast<int>(layer.form())]; },
                     "sparse, dense or depthwise.")
        .def_prop_ro("bytes", &IntegerLayer::bytes, "How much memory they take.");
    m.def("integer_layer", &new_layer, "weights"_a.noconvert(), "groups"_a, "stride"_a, "dilation"_a, "most"_a,
          "Pack integers (out, height, width, in / groups) for codes up to `most`.");
    nb::class_<Program>(m, "IntegerProgram", "A network in integers: steps on images in one arena.")
        .def(nb::init<std::int64_t>(), "bytes"_a)
        .def("encode", &add_encode, "slot"_a, "output"_a, "step"_a, "low"_a, "high"_a)
        .def("layer", &add_layer, "layer"_a, "input"_a, "output"_a, "zero"_a, "padding"_a, "steps"_a.noconvert(),
             "bias"_a.noconvert().none(), "gain"_a.noconvert().none(), "shift"_a.noconvert().none(), "out_step"_a, "low"_a,
             "high"_a, "table"_a.noconvert().none(), "prune"_a)
        .def("layer_to_floats", &add_float_layer, "layer"_a, "input"_a, "slot"_a, "zero"_a, "padding"_a,
             "steps"_a.noconvert(), "bias"_a.noconvert().none(), "gain"_a.noconvert().none(), "shift"_a.noconvert().none())
        .def("recode", &add_recode, "input"_a, "output"_a, "table"_a.noconvert().none(), "prune"_a)
        .def("add", &add_sum, "a"_a, "b"_a, "output"_a, "offset"_a, "low"_a, "high"_a)
        .def("max_pool", &add_max_pool, "input"_a, "output"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a)
        .def("flatten", &add_flatten, "input"_a, "output"_a, "table"_a.noconvert().none(), "prune"_a)
        .def("decode", &add_decode, "input"_a, "slot"_a, "values"_a.noconvert())
        .def("run", &run_program, "first"_a, "last"_a, "slots"_a, "isa"_a, "threads"_a,
             "Run steps [first, last) on the floats at these addresses. Return the number of a step that read a NaN, or -1.");
}

}  // namespace nmcompile
