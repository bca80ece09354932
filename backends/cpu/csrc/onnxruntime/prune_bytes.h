// 4:8 pruning of bytes, as the functions of standard operators in exported files do it (see
// nmcompile/export/write/prune_integers.py).
#pragma once

#include <cstdint>

#include "machine/instruction_sets.h"

namespace nmcompile {

constexpr std::int64_t kBytesBlock = 8;

// Bytes (groups, 8, pixels), in blocks along the middle; `pruned` may be `x`.
struct BytesJob {
    const std::uint8_t* x;
    std::uint8_t* pruned;
    std::int64_t pixels;
    bool wide;  // keys of two bytes, for integers above 31; else keys wrap around as the function's do
};

// Keeps the four largest of each block, of equal ones the first, in the groups from `first` up to `last`.
using PruneBytes = void (*)(const BytesJob& job, std::int64_t first, std::int64_t last);

PruneBytes prune_bytes(InstructionSet isa);

}  // namespace nmcompile
