// The Python face of the sparse GEMM. What the axes mean, and that they stay inside the tensors, is for the caller to
// know: nmcompile/backends/cpu/contraction.py.

#include "gemm_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "gemm.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Input = nb::ndarray<const float, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::device::cpu>;
using Output = nb::ndarray<float, nb::device::cpu>;
// Digits (size, offset, y, x), the last fastest, and the start (offset, y, x).
using AxisSpec = std::tuple<std::vector<std::tuple<std::int64_t, std::int64_t, std::int32_t, std::int32_t>>,
                            std::tuple<std::int64_t, std::int32_t, std::int32_t>>;

GemmAxis axis_of(const AxisSpec& spec) {
    const auto& [digits, start] = spec;
    if (digits.size() > kMaxDigits) throw std::invalid_argument("an axis has too many digits");
    GemmAxis axis{};
    for (Digit& digit : axis.digits) digit.size = 1;
    axis.size = 1;
    const std::size_t unused = kMaxDigits - digits.size();
    for (std::size_t i = 0; i < digits.size(); ++i) {
        const auto& [count, offset, y, x] = digits[i];
        if (count < 1) throw std::invalid_argument("a digit of an axis is empty");
        axis.digits[unused + i] = {count, {offset, y, x}};
        axis.size *= count;
    }
    axis.start = {std::get<0>(start), std::get<1>(start), std::get<2>(start)};
    return axis;
}

bool checked_gemm(const Input& sparse, std::int64_t rows, std::int64_t sparse_row, const AxisSpec& sparse_depth,
                  const Input& dense, const AxisSpec& dense_depth, const AxisSpec& dense_lanes, std::int32_t height,
                  std::int32_t width, const Output& output, std::int64_t output_row, const AxisSpec& output_lanes,
                  const Mask& mask, const Input& bias, const char* isa, unsigned threads) {
    GemmJob job{};
    job.rows = rows;
    job.sparse = sparse.data();
    job.mask = mask.is_valid() ? reinterpret_cast<const std::uint8_t*>(mask.data()) : nullptr;
    job.sparse_row = sparse_row;
    job.sparse_depth = axis_of(sparse_depth);
    job.dense = dense.data();
    job.dense_depth = axis_of(dense_depth);
    job.dense_lanes = axis_of(dense_lanes);
    job.height = height;
    job.width = width;
    job.output = output.data();
    job.output_row = output_row;
    job.output_lanes = axis_of(output_lanes);
    job.bias = bias.is_valid() ? bias.data() : nullptr;
    if (job.sparse_depth.size != job.dense_depth.size || job.dense_lanes.size != job.output_lanes.size) {
        throw std::invalid_argument("the axes do not fit each other");
    }
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return gemm(job, chosen, threads);
}

}  // namespace

void bind_gemm(nb::module_& m) {
    m.def("gemm", &checked_gemm, "sparse"_a.noconvert(), "rows"_a, "sparse_row"_a, "sparse_depth"_a,
          "dense"_a.noconvert(), "dense_depth"_a, "dense_lanes"_a, "height"_a, "width"_a, "output"_a.noconvert(),
          "output_row"_a, "output_lanes"_a, "mask"_a.noconvert().none(), "bias"_a.noconvert().none(), "isa"_a, "threads"_a,
          "Write the product of a 2:4 sparse operand and a dense one; False where the first is not 2:4.");
}

}  // namespace nmcompile
