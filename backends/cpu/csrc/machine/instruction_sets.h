// The instruction sets that kernels are compiled for.
//
// To add a kernel: write `<kernel>_isa.cpp`, with everything in it and in its own headers inside the namespace
// nmcompile::NMCOMPILE_ISA, and add it to `add_instruction_set` in CMakeLists.txt. That compiles it once for each
// instruction set, under that set's name. Call no inline function of the standard library there: the linker keeps one
// copy of such a function, perhaps one with instructions that the machine does not have.
// copy of such a function, perhaps one with instructions that the machine does not have.
#pragma once

#include <vector>

namespace nmcompile {

enum class InstructionSet { baseline, v3, v4 };  // every machine's, x86-64-v3 (AVX2), x86-64-v4 (AVX-512)

constexpr const char* kInstructionSetNames[] = {"baseline", "v3", "v4"};

// Returns the sets that this machine has, the best first.
std::vector<InstructionSet> instruction_sets();

// Throws std::invalid_argument if this machine does not have the named set.
InstructionSet instruction_set(const char* name);

}  // namespace nmcompile
