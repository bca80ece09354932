// Chooses the instruction set and spreads the panels over threads.

#include "transposable.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

#include "storage.h"
#include "transposable_isa.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kElementsPerPiece = 1 << 15;  // take about as long to prune as a thread to start

template <class T>
PanelKernel kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::panel_kernel<T>();
    if (isa == InstructionSet::v3) return v3::panel_kernel<T>();
#endif
    return baseline::panel_kernel<T>();
}

// Calls `work(first, last)` for pieces of [0, count). Threads take pieces until none is left, so that one which has to
// share its core (OpenMP's workers spin there for a while after an operator of torch) does not hold up the others.
template <class Work>
void in_parallel(std::int64_t count, std::int64_t piece, std::int64_t threads, const Work& work) {
    std::atomic<std::int64_t> next = 0;
    const auto take = [&] {
        for (std::int64_t first; (first = next.fetch_add(piece, std::memory_order_relaxed)) < count;) {
            work(first, std::min(first + piece, count));
        }
    };
    std::vector<std::thread> started;
    for (std::int64_t t = 1; t < threads; ++t) {
        try {
            started.emplace_back(take);
        } catch (const std::system_error&) {
            break;  // no thread to be had: the others do its part
        }
    }
    take();
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
    const std::int64_t piece = std::max<std::int64_t>(1, kElementsPerPiece / kernel.elements);
    const std::int64_t pieces = (panels + piece - 1) / piece;
    in_parallel(panels, piece, std::min<std::int64_t>(pieces, threads),
                [&](std::int64_t first, std::int64_t last) { kernel.run(job, first, last); });
}

template void transposable<double>(const TransposableJob&, InstructionSet, unsigned);
template void transposable<float>(const TransposableJob&, InstructionSet, unsigned);
template void transposable<Half>(const TransposableJob&, InstructionSet, unsigned);
template void transposable<BFloat16>(const TransposableJob&, InstructionSet, unsigned);

}  // namespace nmcompile
