#include "onnxruntime/prune_bytes.h"

#include "onnxruntime/prune_bytes_isa.h"

namespace nmcompile {

PruneBytes prune_bytes_kernel([[maybe_unused]] InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::prune_bytes;
    if (isa == InstructionSet::v3) return v3::prune_bytes;
#endif
    return baseline::prune_bytes;
}

}  // namespace nmcompile
