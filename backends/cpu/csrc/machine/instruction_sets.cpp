#include "machine/instruction_sets.h"

#include <stdexcept>
#include <string>

namespace nmcompile {

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> result;
#if defined(__x86_64__)
    // The other parts of each set came to processors earlier than these.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) result.push_back(InstructionSet::v4);
    if (v3) result.push_back(InstructionSet::v3);
#endif
    result.push_back(InstructionSet::baseline);
    return result;
}

InstructionSet instruction_set(const char* name) {
    for (const InstructionSet isa : instruction_sets()) {
        if (std::string(name) == kInstructionSetNames[static_cast<int>(isa)]) return isa;
    }
    throw std::invalid_argument("this machine does not have the instruction set " + std::string(name));
}

}  // namespace nmcompile
