// Python interface of packed integers: checks that the operands fit each other.

#include "integers/packed_integers_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/unique_ptr.h>

#include <stdexcept>

#include "integers/packed_integers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Integers = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NewCodes = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Column = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::unique_ptr<PackedIntegers> checked_pack(const Integers& integers, unsigned threads) {
    if (integers.shape(1) % 4) throw std::invalid_argument("the depth is no multiple of four");
    nb::gil_scoped_release release;
    return pack_integers(integers.data(), static_cast<std::int64_t>(integers.shape(0)),
                         static_cast<std::int64_t>(integers.shape(1)), threads);
}

bool checked_code(const Values& values, float step, int low, int high, const NewCodes& codes) {
    const auto tokens = static_cast<std::int64_t>(values.shape(0)), depth = static_cast<std::int64_t>(values.shape(1));
    const auto stride = static_cast<std::int64_t>(codes.shape(1));
    if (static_cast<std::int64_t>(codes.shape(0)) != tokens || stride < depth || high - low < 0 || high - low > 255) {
        throw std::invalid_argument("the codes do not fit the values");
    }
    nb::gil_scoped_release release;
    return code_integers(values.data(), tokens, depth, step, low, high, codes.data(), stride);
}

void checked_multiply(const PackedIntegers& packed, const Codes& input, std::int32_t input_zero, const Column& steps,
                      const Column& bias, const Output& output, const char* isa, unsigned threads) {
    const std::size_t rows = packed.rows(), depth = packed.blocks() * kBlockDepth, tokens = input.shape(0);
    const bool fits = input.shape(1) == depth && steps.shape(0) == rows && output.shape(0) == tokens &&
                      output.shape(1) == rows && (!bias.is_valid() || bias.shape(0) == rows);
    if (!fits) throw std::invalid_argument("the operands do not fit the packed integers");
    const IntegersJob job{packed.data(), packed.sums().data(), packed.rows(), packed.blocks(), input.data(), input_zero,
                          static_cast<std::int64_t>(tokens), steps.data(), bias.is_valid() ? bias.data() : nullptr,
                          output.data()};
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    multiply_integers(job, chosen, threads);
}

}  // namespace

void bind_packed_integers(nb::module_& m) {
    m.attr("INTEGERS_DEPTH") = kBlockDepth;
    nb::class_<PackedIntegers>(m, "PackedIntegers", "A 2:4 matrix of 4-bit integers, in twelve bits for each four.")
        .def_prop_ro("bytes", &PackedIntegers::bytes, "How much memory it takes.");
    m.def("pack_integers", &checked_pack, "integers"_a.noconvert(), "threads"_a,
          "Integers (rows, depth) packed; None where some four keep more than two, or one has more than four bits.");
    m.def("code_integers", &checked_code, "values"_a.noconvert(), "step"_a, "low"_a, "high"_a, "codes"_a.noconvert(),
          "Write values / step - low (tokens, depth) to wider codes; False if a value is no whole step in [low, high].");
    m.def("multiply_integers", &checked_multiply, "packed"_a, "input"_a.noconvert(), "input_zero"_a,
          "steps"_a.noconvert(), "bias"_a.noconvert().none(), "output"_a.noconvert(), "isa"_a, "threads"_a,
          "Write (input - input_zero) (tokens, depth) times the transposed integers to output (tokens, rows).");
}

}  // namespace nmcompile
