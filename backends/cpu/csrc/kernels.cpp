// The Python module nmcompile._kernels. Tensors come through DLPack.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "decoder/decoder_module.h"
#include "fingerprint.h"
#include "gemm/gemm_module.h"
#include "integers/frozen_linear_module.h"
#include "integers/packed_integers_module.h"
#include "machine/instruction_sets.h"
#include "machine/spare_memory.h"
#include "masked.h"
#include "network/convolution_module.h"
#include "network/program_module.h"
#include "onnxruntime/prune_bytes.h"
#include "prune/prune_module.h"
#include "transposable/transposable_module.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace nmcompile;

namespace {

nb::ndarray<nb::pytorch, std::uint8_t, nb::ndim<1>, nb::device::cpu> memory(std::size_t bytes) {
    auto* const memory = new Memory(bytes);
    const nb::capsule owner(memory, [](void* dropped) noexcept { delete static_cast<Memory*>(dropped); });
    return {memory->data(), {bytes}, owner};
}

std::int64_t fingerprint_at(std::uintptr_t address, std::int64_t bytes, unsigned threads) {
    nb::gil_scoped_release release;
    return fingerprint(reinterpret_cast<const std::uint8_t*>(address), bytes, threads);
}

void write_masked_at(std::uintptr_t x, std::uintptr_t mask, std::uintptr_t out, std::int64_t count, int size,
                     unsigned threads) {
    nb::gil_scoped_release release;
    write_masked(reinterpret_cast<const void*>(x), reinterpret_cast<const std::uint8_t*>(mask),
                 reinterpret_cast<void*>(out), count, size, threads);
}

void prune_bytes_at(std::uintptr_t x, std::uintptr_t pruned, std::int64_t blocks, bool wide, const char* isa) {
    nb::gil_scoped_release release;
    prune_bytes_kernel(instruction_set(isa))(reinterpret_cast<const std::uint8_t*>(x),
                                             reinterpret_cast<std::uint8_t*>(pruned), blocks, wide);
}

}  // namespace

NB_MODULE(_kernels, m) {
    // Values cached for weights live until the process ends, which is not a leak.
    nb::set_leak_warnings(false);
    m.doc() = "Native kernels of the CPU backend; the modules of nmcompile.backends.cpu wrap them.";
    nb::list names;
    for (const InstructionSet isa : instruction_sets()) names.append(kInstructionSetNames[static_cast<int>(isa)]);
    m.attr("INSTRUCTION_SETS") = nb::tuple(names);
    m.def("memory", &memory, "bytes"_a, "Bytes of any values, in memory that dropped ones have left if it fits.");
    m.def("fingerprint", &fingerprint_at, "address"_a, "bytes"_a, "threads"_a,
          "Of what lies there, a number that changes with it (see nmcompile.ir.fingerprint). Exporting a tensor would take"
          " longer than a small weight.");
    m.def("write_masked", &write_masked_at, "x"_a, "mask"_a, "out"_a, "count"_a, "size"_a, "threads"_a,
          "Write the elements at address `x`, of `size` bytes each, to `out`: zero where the mask does not hold.");
    m.def("prune_bytes", &prune_bytes_at, "x"_a, "pruned"_a, "blocks"_a, "wide"_a, "isa"_a,
          "Write the four largest of each eight bytes at address `x` to `pruned`, which may be `x`, and zeros between them;"
          " without `wide`, of bytes below 32. ONNX Runtime calls this by the library's RegisterCustomOps.");
    bind_gemm(m);
    bind_network(m);
    bind_convolution(m);
    bind_packed_integers(m);
    bind_frozen_linear(m);
    bind_decoder(m);
    bind_prune(m);
    bind_transposable(m);
}
