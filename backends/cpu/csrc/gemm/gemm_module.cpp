// Python interface of the sparse GEMM. The caller is responsible for the meaning of the axes, and for their staying
// inside the tensors: nmcompile/backends/cpu/contraction.py.

#include "gemm/gemm_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "gemm/gemm.h"

namespace nb = nanobind;
using namespace nb::literals;

template <>
struct nanobind::detail::dtype_traits<nmcompile::BFloat16> {
    static constexpr dlpack::dtype value{static_cast<std::uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
    static constexpr auto name = const_name("bfloat16");
};

namespace nmcompile {
namespace {

template <class T>
using Input = nb::ndarray<const T, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::device::cpu>;
template <class T>
using Output = nb::ndarray<T, nb::device::cpu>;
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

template <class T>
void set_sparse(GemmJob<T>& job, const Input<T>& sparse, std::int64_t rows, std::int64_t sparse_row,
                const AxisSpec& sparse_depth, const Mask& mask) {
    job.rows = rows;
    job.sparse = sparse.data();
    job.mask = mask.is_valid() ? reinterpret_cast<const std::uint8_t*>(mask.data()) : nullptr;
    job.sparse_row = sparse_row;
    job.sparse_depth = axis_of(sparse_depth);
}

template <class T>
void set_dense(GemmJob<T>& job, std::int64_t depth, const Input<T>& dense, const AxisSpec& dense_depth,
               const AxisSpec& dense_lanes, std::int32_t height, std::int32_t width, const Output<T>& output,
               std::int64_t output_row, const AxisSpec& output_lanes, const Input<T>& bias) {
    job.dense = dense.data();
    job.dense_depth = axis_of(dense_depth);
    job.dense_lanes = axis_of(dense_lanes);
    job.height = height;
    job.width = width;
    job.output = output.data();
    job.output_row = output_row;
    job.output_lanes = axis_of(output_lanes);
    job.bias = bias.is_valid() ? bias.data() : nullptr;
    if (depth != job.dense_depth.size || job.dense_lanes.size != job.output_lanes.size) {
        throw std::invalid_argument("the axes do not fit each other");
    }
}

template <class T>
bool checked_gemm(const Input<T>& sparse, std::int64_t rows, std::int64_t sparse_row, const AxisSpec& sparse_depth,
                  const Input<T>& dense, const AxisSpec& dense_depth, const AxisSpec& dense_lanes, std::int32_t height,
                  std::int32_t width, const Output<T>& output, std::int64_t output_row, const AxisSpec& output_lanes,
                  const Mask& mask, const Input<T>& bias, const char* isa, unsigned threads) {
    GemmJob<T> job{};
    set_sparse(job, sparse, rows, sparse_row, sparse_depth, mask);
    set_dense(job, job.sparse_depth.size, dense, dense_depth, dense_lanes, height, width, output, output_row,
              output_lanes, bias);
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return gemm(job, chosen, threads);
}

template <class T>
bool checked_pruned(const Input<T>& sparse, std::int64_t rows, std::int64_t sparse_row, const AxisSpec& sparse_depth,
                    const Input<T>& dense, const AxisSpec& dense_depth, const AxisSpec& dense_lanes, std::int32_t height,
                    std::int32_t width, const Output<T>& output, std::int64_t output_row, const AxisSpec& output_lanes,
                    const char* op, int n_keep, int block, std::uint64_t key, const char* isa, unsigned threads) {
    GemmJob<T> job{};
    set_sparse(job, sparse, rows, sparse_row, sparse_depth, Mask());
    set_dense(job, job.sparse_depth.size, dense, dense_depth, dense_lanes, height, width, output, output_row,
              output_lanes, Input<T>());
    const Operator chosen_op = operator_of(op);
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return gemm_pruned(job, chosen_op, {n_keep, block, false, false, key}, chosen, threads);
}

template <class T>
std::unique_ptr<PackedSparse> checked_pack(const Input<T>& sparse, std::int64_t rows, std::int64_t sparse_row,
                                           const AxisSpec& sparse_depth, const Mask& mask, const char* isa,
                                           unsigned threads) {
    GemmJob<T> job{};
    set_sparse(job, sparse, rows, sparse_row, sparse_depth, mask);
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return pack_sparse(job, chosen, threads);
}

template <class T>
bool checked_packed(const PackedSparse& packed, const Input<T>& dense, const AxisSpec& dense_depth,
                    const AxisSpec& dense_lanes, std::int32_t height, std::int32_t width, const Output<T>& output,
                    std::int64_t output_row, const AxisSpec& output_lanes, const Input<T>& bias, const char* isa,
                    unsigned threads) {
    GemmJob<T> job{};
    job.rows = packed.rows();
    set_dense(job, packed.depth(), dense, dense_depth, dense_lanes, height, width, output, output_row, output_lanes,
              bias);
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return gemm_packed(job, packed, chosen, threads);
}

template <class T>
void bind_products_of(nb::module_& m) {
    m.def("gemm", &checked_gemm<T>, "sparse"_a.noconvert(), "rows"_a, "sparse_row"_a, "sparse_depth"_a,
          "dense"_a.noconvert(), "dense_depth"_a, "dense_lanes"_a, "height"_a, "width"_a, "output"_a.noconvert(),
          "output_row"_a, "output_lanes"_a, "mask"_a.noconvert().none(), "bias"_a.noconvert().none(), "isa"_a, "threads"_a,
          "Write the product of a 2:4 sparse operand and a dense one; False where they are not such or not finite.");
    m.def("gemm_pruned", &checked_pruned<T>, "sparse"_a.noconvert(), "rows"_a, "sparse_row"_a, "sparse_depth"_a,
          "dense"_a.noconvert(), "dense_depth"_a, "dense_lanes"_a, "height"_a, "width"_a, "output"_a.noconvert(),
          "output_row"_a, "output_lanes"_a, "op"_a, "n_keep"_a, "block"_a, "key"_a, "isa"_a, "threads"_a,
          "The same with an operand that is pruned along depth while it is packed.");
    m.def("pack_sparse", &checked_pack<T>, "sparse"_a.noconvert(), "rows"_a, "sparse_row"_a, "sparse_depth"_a,
          "mask"_a.noconvert().none(), "isa"_a, "threads"_a, "A 2:4 operand packed; None where it is not 2:4 or not finite.");
    m.def("gemm_packed", &checked_packed<T>, "packed"_a, "dense"_a.noconvert(), "dense_depth"_a, "dense_lanes"_a,
          "height"_a, "width"_a, "output"_a.noconvert(), "output_row"_a, "output_lanes"_a, "bias"_a.noconvert().none(),
          "isa"_a, "threads"_a, "Write the product of a packed operand and a dense one of its type; False where that is not finite.");
}

}  // namespace

void bind_gemm(nb::module_& m) {
    nb::class_<PackedSparse>(m, "PackedSparse", "A 2:4 operand without its zeros.")
        .def_prop_ro("bytes", &PackedSparse::bytes, "How much memory it takes.");
    bind_products_of<float>(m);
    bind_products_of<BFloat16>(m);
}

}  // namespace nmcompile
