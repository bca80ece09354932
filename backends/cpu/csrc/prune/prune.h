// The pruning operators on strided tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/instruction_sets.h"
#include "prune/block_grid.h"

namespace nmcompile {

struct PruneJob {
    Operator op;
    Rule rule;
    std::vector<Axis> axes;
    std::size_t dim;
    const void* in;
    void* out;
    std::uint8_t* indices;  // null unless the output is packed
    Form form;
    InstructionSet isa;
    unsigned threads;
};

// Equals the reference operators of nmcompile/pruning bit for bit; T is double, float, Half or BFloat16. Returns false
// if there is no kernel for the operator, pattern and output.
template <class T>
bool prune(const PruneJob& job);

}  // namespace nmcompile
