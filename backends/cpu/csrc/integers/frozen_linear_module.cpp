// Python interface of frozen linear layers. A call takes addresses: exporting two tensors would take as long as the
// product of a small layer and one token.

#include "integers/frozen_linear_module.h"

#include <nanobind/ndarray.h>

#include <stdexcept>

#include "integers/frozen_linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Column = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<float> copied(const Column& column) { return {column.data(), column.data() + column.shape(0)}; }

void make(FrozenLinear* self, const PackedIntegers& packed, float step, int low, int high, const Column& steps,
          const Column& bias) {
    const std::size_t rows = packed.rows();
    if (high < low || high - low > 15 || steps.shape(0) != rows || (bias.is_valid() && bias.shape(0) != rows)) {
        throw std::invalid_argument("the operands do not fit the packed integers");
    }
    std::vector<float> shift;
    if (bias.is_valid()) shift = copied(bias);
    new (self) FrozenLinear{packed, {step, low, high}, copied(steps), std::move(shift)};
}

bool run_at(const FrozenLinear& self, std::uintptr_t input, std::int64_t tokens, std::uintptr_t output, const char* isa,
            unsigned threads) {
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return self.run(reinterpret_cast<const float*>(input), tokens, reinterpret_cast<float*>(output), chosen, threads);
}

}  // namespace

void bind_frozen_linear(nb::module_& m) {
    nb::class_<FrozenLinear>(m, "FrozenLinear", "A linear layer whose operands, its input excepted, do not change.")
        .def("__init__", &make, "packed"_a, "step"_a, "low"_a, "high"_a, "steps"_a.noconvert(),
             "bias"_a.noconvert().none(), nb::keep_alive<1, 2>())
        .def("run", &run_at, "input"_a, "tokens"_a, "output"_a, "isa"_a, "threads"_a,
             "Write to address `output` the layer's results for the tokens at `input`; False if one is a NaN.");
}

}  // namespace nmcompile
