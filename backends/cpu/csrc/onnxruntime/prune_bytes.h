// 4:8 pruning of bytes, as the functions of standard operators in exported files do it (see
// nmcompile/export/write/prune_integers.py).
#pragma once

#include <cstdint>

#include "machine/instruction_sets.h"

namespace nmcompile {

constexpr int kBytesBlock = 8;

// Writes the four largest bytes of each block, of equal ones the first, and zeros for the others. `pruned` may be `x`.
// Bytes below 32 are compared by keys of one byte, which wrap around above as the function's do; `wide` takes all bytes.
using PruneBytes = void (*)(const std::uint8_t* x, std::uint8_t* pruned, std::int64_t blocks, bool wide);

PruneBytes prune_bytes_kernel(InstructionSet isa);

}  // namespace nmcompile
