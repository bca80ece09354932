// The pruning operators as compiled for each instruction set (see prune_isa.cpp).
#pragma once

#include "machine/instruction_sets.h"
#include "prune/block_run.h"

namespace nmcompile {

using PruneKernel = void (*)(const Run& run, const Rule& rule);

namespace baseline {
template <class T>
PruneKernel prune_kernel(Operator op, Form form, const Rule& rule);
}
#if defined(__x86_64__)
namespace v3 {
template <class T>
PruneKernel prune_kernel(Operator op, Form form, const Rule& rule);
}
namespace v4 {
template <class T>
PruneKernel prune_kernel(Operator op, Form form, const Rule& rule);
}
#endif

// Returns a kernel for this form of the output, nullptr if there is none.
template <class T>
PruneKernel prune_kernel(Operator op, Form form, const Rule& rule, InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::prune_kernel<T>(op, form, rule);
    if (isa == InstructionSet::v3) return v3::prune_kernel<T>(op, form, rule);
#endif
    return baseline::prune_kernel<T>(op, form, rule);
}

}  // namespace nmcompile
