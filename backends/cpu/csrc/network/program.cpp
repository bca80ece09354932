#include "network/program.h"

namespace nmcompile {

const Kernels& network_kernels([[maybe_unused]] InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
        return vnni::network_kernels;
    }
    if (isa != InstructionSet::baseline) return v3::network_kernels;
#endif
    return baseline::network_kernels;
}

std::int64_t Program::run(std::int64_t first, std::int64_t last, const std::vector<float*>& slots, InstructionSet isa,
                          unsigned threads) {
    const std::lock_guard<std::mutex> alone(running_);
    const Run run{arena_.data(), slots, network_kernels(isa), threads};
    for (std::int64_t i = first; i < last; ++i) {
        if (!steps_[i]->run(run)) return i;
    }
    return -1;
}

}  // namespace nmcompile
