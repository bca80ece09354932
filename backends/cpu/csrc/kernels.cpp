// The Python module nmcompile._kernels. Tensors come through DLPack.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <vector>

#include "mvue.h"
#include "mvue_block.h"
#include "storage.h"
#include "transposable_module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace nmcompile;

namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

std::vector<Axis> axes_of(const Input& x, const Output& out) {
    if (x.ndim() != out.ndim() || x.dtype() != out.dtype()) {
        throw std::invalid_argument("x and out differ in dtype or number of dims; make out with torch.empty_like(x)");
    }
    std::vector<Axis> axes(x.ndim());
    for (std::size_t i = 0; i < axes.size(); ++i) {
        if (x.shape(i) != out.shape(i)) {
            throw std::invalid_argument("x and out differ in shape; make out with torch.empty_like(x)");
        }
        axes[i] = {static_cast<std::int64_t>(x.shape(i)), x.stride(i), out.stride(i)};
    }
    return axes;
}

template <class T>
void prune(const Input& x, const Output& out, std::size_t dim, int n_keep, int block, std::uint64_t key,
           unsigned threads) {
    const std::vector<Axis> axes = axes_of(x, out);
    nb::gil_scoped_release release;
    mvue(static_cast<const T*>(x.data()), static_cast<T*>(out.data()), axes, dim, n_keep, block, key, threads);
}

void checked_mvue(const Input& x, const Output& out, std::size_t dim, int n_keep, int block, std::uint64_t key,
                  unsigned threads) {
    if (dim >= x.ndim()) throw std::invalid_argument("dim does not exist in x");
    if (n_keep < 1 || n_keep >= block || block > kMaxBlock) {
        throw std::invalid_argument("the pattern N:M needs 1 <= N < M <= MAX_BLOCK");
    }
    using Code = nb::dlpack::dtype_code;
    const auto is = [&](Code code, int bits) {
        return x.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
    };
    if (is(Code::Float, 32)) return prune<float>(x, out, dim, n_keep, block, key, threads);
    if (is(Code::Float, 64)) return prune<double>(x, out, dim, n_keep, block, key, threads);
    if (is(Code::Float, 16)) return prune<Half>(x, out, dim, n_keep, block, key, threads);
    if (is(Code::Bfloat, 16)) return prune<BFloat16>(x, out, dim, n_keep, block, key, threads);
    throw std::invalid_argument("x is not float64, float32, float16 or bfloat16");
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Native kernels of the CPU backend; nmcompile.backends.cpu.kernels wraps them.";
    m.attr("MAX_BLOCK") = kMaxBlock;
    m.def("mvue", &checked_mvue, "x"_a.noconvert(), "out"_a.noconvert(), "dim"_a, "n_keep"_a, "block"_a, "key"_a,
          "threads"_a, "Write the MVUE of `x` into `out`, a tensor of its shape and dtype.");
    bind_transposable(m);
}
