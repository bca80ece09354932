// The pruning operators as compiled for each instruction set (see prune_isa.cpp).
#pragma once

#include "block_run.h"

namespace nmcompile {

using PruneKernel = void (*)(const Run& run, const Rule& rule);

namespace baseline {
template <class T>
PruneKernel prune_kernel(Operator op, bool packed, const Rule& rule);
}
#if defined(__x86_64__)
namespace v3 {
template <class T>
PruneKernel prune_kernel(Operator op, bool packed, const Rule& rule);
}
namespace v4 {
template <class T>
PruneKernel prune_kernel(Operator op, bool packed, const Rule& rule);
}
#endif

}  // namespace nmcompile
