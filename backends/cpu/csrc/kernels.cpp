// The Python module nmcompile._kernels. Tensors come through DLPack.

#include <nanobind/nanobind.h>

#include "gemm_module.h"
#include "instruction_sets.h"
#include "packed_integers_module.h"
#include "prune_module.h"
#include "transposable_module.h"

namespace nb = nanobind;
using namespace nmcompile;

NB_MODULE(_kernels, m) {
    // What is kept of weights lives until the process ends, and is no leak.
    nb::set_leak_warnings(false);
    m.doc() = "Native kernels of the CPU backend; the modules of nmcompile.backends.cpu wrap them.";
    nb::list names;
    for (const InstructionSet isa : instruction_sets()) names.append(kInstructionSetNames[static_cast<int>(isa)]);
    m.attr("INSTRUCTION_SETS") = nb::tuple(names);
    bind_gemm(m);
    bind_packed_integers(m);
    bind_prune(m);
    bind_transposable(m);
}
