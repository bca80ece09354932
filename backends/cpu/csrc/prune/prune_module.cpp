// Python interface of the pruning operators: checks operands and finds their strides.

#include "prune/prune_module.h"

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "machine/storage.h"
#include "prune/prune.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

bool is_mask(const Output& out) { return out.dtype() == nb::dtype<bool>(); }

// Returns the dims of x with the strides of the outputs, after checking the outputs' shapes and dtypes.
std::vector<Axis> axes_of(const Input& x, const Output& out, const Output& indices, std::size_t dim) {
    const bool packed = indices.is_valid();
    bool fits = x.ndim() == out.ndim() && (is_mask(out) || x.dtype() == out.dtype());
    fits = fits && (!packed || (indices.ndim() == x.ndim() && indices.dtype() == nb::dtype<std::uint8_t>()));
    std::vector<Axis> axes(fits ? x.ndim() : 0);
    for (std::size_t i = 0; i < axes.size(); ++i) {
        const std::size_t size = x.shape(i);
        const bool halved = packed && i == dim;
        fits = fits && out.shape(i) == (halved ? size / 2 : size);
        if (packed) {
            fits = fits && indices.shape(i) == (halved ? (size + kPackedUnit - 1) / kPackedUnit : size);
            fits = fits && (!halved || size % kPackedGroup == 0);
        }
        if (fits) {
            axes[i] = {static_cast<std::int64_t>(size), x.stride(i), out.stride(i), packed ? indices.stride(i) : 0};
        }
    }
    if (!fits) throw std::invalid_argument("the outputs do not fit x in shape or dtype");
    return axes;
}

void checked_prune(const char* op, const Input& x, const Output& out, const Output& indices, std::size_t dim,
                   int n_keep, int block, bool relu, std::uint64_t key, const char* isa, unsigned threads) {
    if (dim >= x.ndim()) throw std::invalid_argument("dim does not exist in x");
    if (n_keep < 1 || n_keep >= block || block > kMaxBlock) {
        throw std::invalid_argument("the pattern N:M needs 1 <= N < M <= MAX_BLOCK");
    }
    PruneJob job{};
    job.op = operator_of(op);
    job.rule = {n_keep, block, relu, false, key};
    job.axes = axes_of(x, out, indices, dim);
    job.dim = dim;
    job.in = x.data();
    job.out = out.data();
    job.indices = indices.is_valid() ? static_cast<std::uint8_t*>(indices.data()) : nullptr;
    job.form = job.indices != nullptr ? Form::packed : is_mask(out) ? Form::mask : Form::values;
    job.isa = instruction_set(isa);
    job.threads = threads;

    using Code = nb::dlpack::dtype_code;
    const auto is = [&](Code code, int bits) {
        return x.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
    };
    const bool f64 = is(Code::Float, 64), f32 = is(Code::Float, 32), f16 = is(Code::Float, 16);
    if (!f64 && !f32 && !f16 && !is(Code::Bfloat, 16)) {
        throw std::invalid_argument("x is not float64, float32, float16 or bfloat16");
    }
    bool known = false;
    {
        nb::gil_scoped_release release;
        known = f64 ? prune<double>(job) : f32 ? prune<float>(job) : f16 ? prune<Half>(job) : prune<BFloat16>(job);
    }
    if (!known) throw std::invalid_argument("there is no kernel for this operator with this pattern and output");
}

}  // namespace

void bind_prune(nb::module_& m) {
    m.attr("MAX_BLOCK") = kMaxBlock;
    m.def("prune", &checked_prune, "op"_a, "x"_a.noconvert(), "out"_a.noconvert(), "indices"_a.noconvert().none(),
          "dim"_a, "n_keep"_a, "block"_a, "relu"_a, "key"_a, "isa"_a, "threads"_a,
          "Write `x`, pruned by an operator, into `out`; packed into `out` and `indices` if they are given; a bool `out` "
          "gets the mask of the kept elements.");
}

}  // namespace nmcompile
