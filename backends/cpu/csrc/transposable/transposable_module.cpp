// Python interface of the transposable mask: checks operands and finds their strides.

#include "transposable/transposable_module.h"

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "machine/storage.h"
#include "transposable/transposable.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

// The two tiled dims of a tensor; all others are batch.
struct Dims {
    std::size_t row, column;
};

template <class Array>
TileOperand operand(const Array& array, const Dims& dims) {
    TileOperand result;
    result.data = const_cast<void*>(static_cast<const void*>(array.data()));
    result.row = array.stride(dims.row);
    result.column = array.stride(dims.column);
    int batch = 0;
    for (std::size_t i = 0; i < array.ndim(); ++i) {
        if (i != dims.row && i != dims.column) result.batch[batch++] = array.stride(i);
    }
    return result;
}

TransposableJob job_of(const Input& x, const Dims& dims) {
    if (dims.row >= x.ndim() || dims.column >= x.ndim() || dims.row == dims.column) {
        throw std::invalid_argument("rows and columns are not two dims of x");
    }
    if (x.ndim() > kMaxBatchDims + 2) throw std::invalid_argument("x has more than MAX_BATCH_DIMS other dims");
    TransposableJob job{};
    job.rows = static_cast<std::int64_t>(x.shape(dims.row));
    job.columns = static_cast<std::int64_t>(x.shape(dims.column));
    for (std::size_t i = 0; i < x.ndim(); ++i) {
        if (i != dims.row && i != dims.column) job.batch[job.batch_dims++] = static_cast<std::int64_t>(x.shape(i));
    }
    job.x = operand(x, dims);
    return job;
}

// Returns the strides of an output, if it is wanted, after checking that it has the shape of x except in `rows` and
// `columns`.
TileOperand checked(const Output& out, const Input& x, const Dims& dims, std::int64_t rows, std::int64_t columns,
                    bool is_like_x, const char* name) {
    if (!out.is_valid()) return {};
    bool fits = out.ndim() == x.ndim() && (is_like_x ? out.dtype() == x.dtype() : out.dtype().bits == 8);
    for (std::size_t i = 0; fits && i < x.ndim(); ++i) {
        const auto size = static_cast<std::int64_t>(out.shape(i));
        fits = size == (i == dims.row ? rows : i == dims.column ? columns : static_cast<std::int64_t>(x.shape(i)));
    }
    if (!fits) throw std::invalid_argument(std::string(name) + " does not fit x in shape or dtype");
    return operand(out, dims);
}

void prune(const Input& x, std::size_t row_dim, std::size_t column_dim, const Output& mask, const Output& pruned,
           const Output& forward_values, const Output& forward_indices, const Output& backward_values,
           const Output& backward_indices, const char* isa, unsigned threads) {
    const Dims dims = {row_dim, column_dim};
    TransposableJob job = job_of(x, dims);
    const std::int64_t rows = job.rows, columns = job.columns;
    if (forward_values.is_valid() != forward_indices.is_valid() ||
        backward_values.is_valid() != backward_indices.is_valid()) {
        throw std::invalid_argument("a packed form is values and indices: give both");
    }
    if ((forward_values.is_valid() && columns % 4 != 0) || (backward_values.is_valid() && rows % 4 != 0)) {
        throw std::invalid_argument("a packed form needs whole groups of four");
    }
    job.mask = checked(mask, x, dims, rows, columns, false, "mask");
    job.pruned = checked(pruned, x, dims, rows, columns, true, "pruned");
    job.forward_values = checked(forward_values, x, dims, rows, columns / 2, true, "forward_values");
    job.forward_indices = checked(forward_indices, x, dims, rows, (columns + 7) / 8, false, "forward_indices");
    job.backward_values = checked(backward_values, x, dims, rows / 2, columns, true, "backward_values");
    job.backward_indices = checked(backward_indices, x, dims, (rows + 7) / 8, columns, false, "backward_indices");
    const InstructionSet chosen = instruction_set(isa);

    using Code = nb::dlpack::dtype_code;
    const auto is = [&](Code code, int bits) {
        return x.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
    };
    const bool f64 = is(Code::Float, 64), f32 = is(Code::Float, 32), f16 = is(Code::Float, 16);
    if (!f64 && !f32 && !f16 && !is(Code::Bfloat, 16)) {
        throw std::invalid_argument("x is not float64, float32, float16 or bfloat16");
    }
    if (x.size() == 0) return;
    nb::gil_scoped_release release;
    if (f64) return transposable<double>(job, chosen, threads);
    if (f32) return transposable<float>(job, chosen, threads);
    if (f16) return transposable<Half>(job, chosen, threads);
    transposable<BFloat16>(job, chosen, threads);
}

}  // namespace

void bind_transposable(nb::module_& m) {
    m.attr("MAX_BATCH_DIMS") = kMaxBatchDims;
    m.def("transposable", &prune, "x"_a.noconvert(), "rows"_a, "columns"_a, "mask"_a.noconvert().none(),
          "pruned"_a.noconvert().none(), "forward_values"_a.noconvert().none(), "forward_indices"_a.noconvert().none(),
          "backward_values"_a.noconvert().none(), "backward_indices"_a.noconvert().none(), "isa"_a, "threads"_a,
          "Write what follows from the exact transposable 2:4 mask of `x` into the outputs that are not None.");
}

}  // namespace nmcompile
