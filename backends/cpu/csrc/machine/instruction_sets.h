// The instruction sets that kernels are compiled for.
//
// To add a kernel: write `<kernel>_isa.cpp`, everything in it and in the headers of its own inside the namespace
// nmcompile::NMCOMPILE_ISA, and add it to `add_instruction_set` in CMakeLists.txt, which compiles it once for each
// instruction set under that set's name. Call no inline function of the standard library there: the linker keeps one
// copy of such a function, perhaps one with instructions that the machine does not have.
#pragma once

#include <vector>

namespace nmcompile {

enum class InstructionSet { baseline, v3, v4 };  // what every machine has, x86-64-v3 (AVX2), x86-64-v4 (AVX-512)

constexpr const char* kInstructionSetNames[] = {"baseline", "v3", "v4"};

// Those that this machine has, the best first.
std::vector<InstructionSet> instruction_sets();

// Throws std::invalid_argument where this machine does not have the named one.
InstructionSet instruction_set(const char* name);

}  // namespace nmcompile
