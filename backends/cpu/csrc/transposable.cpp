// Chooses the instruction set and spreads the panels over threads.

#include "transposable.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "storage.h"
#include "transposable_isa.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kElementsPerThread = 1 << 16;  // a thread costs about as long to start as these take to prune

template <class T>
PanelKernel kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::panel_kernel<T>();
    if (isa == InstructionSet::v3) return v3::panel_kernel<T>();
#endif
    return baseline::panel_kernel<T>();
}

template <class Work>
void in_parallel(std::int64_t count, std::int64_t threads, const Work& work) {
    std::vector<std::thread> started;
    std::int64_t first = 0;
    for (std::int64_t t = 1; t < threads; ++t) {
        const std::int64_t last = count * t / threads;
        try {
            started.emplace_back(work, first, last);
        } catch (const std::system_error&) {
            break;  // no thread to be had: the rest runs here
        }
        first = last;
    }
    work(first, count);
    for (std::thread& thread : started) thread.join();
}

}  // namespace

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> result;
#if defined(__x86_64__)
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

template <class T>
void transposable(const TransposableJob& job, InstructionSet isa, unsigned threads) {
    const PanelKernel kernel = kernel_of<T>(isa);
    const std::int64_t panels = kernel.count(job);
    const std::int64_t useful = panels * kernel.elements / kElementsPerThread;
    in_parallel(panels, std::clamp<std::int64_t>(useful, 1, std::max(1u, threads)),
                [&](std::int64_t first, std::int64_t last) { kernel.run(job, first, last); });
}

template void transposable<double>(const TransposableJob&, InstructionSet, unsigned);
template void transposable<float>(const TransposableJob&, InstructionSet, unsigned);
template void transposable<Half>(const TransposableJob&, InstructionSet, unsigned);
template void transposable<BFloat16>(const TransposableJob&, InstructionSet, unsigned);

}  // namespace nmcompile
