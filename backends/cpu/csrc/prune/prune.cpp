// Chooses the kernel and spreads the runs over threads.

#include "prune/prune.h"

#include <algorithm>

#include "machine/parallel.h"
#include "machine/storage.h"
#include "prune/prune_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nmcompile {
namespace {

// Elements whose pruning takes longer than the start of a thread; drawing takes several times as long as ranking.
constexpr std::int64_t elements_per_thread(Operator op) {
    return op == Operator::mvue || op == Operator::mvue_approx ? 1 << 15 : 1 << 17;
}
constexpr std::int64_t kStreamedBytes = 1 << 23;      // would not stay in a cache anyway

// Makes streamed stores visible to other threads in order.
void finish_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace

template <class T>
bool prune(const PruneJob& job) {
    const PruneKernel kernel = prune_kernel<T>(job.op, job.form, job.rule, job.isa);
    if (kernel == nullptr) return false;
    std::int64_t elements = 1;
    for (const Axis& axis : job.axes) elements *= axis.size;
    if (elements == 0) return true;

    Rule rule = job.rule;
    rule.streams = elements * static_cast<std::int64_t>(sizeof(T)) >= kStreamedBytes;
    Run pointers{};
    pointers.in = job.in;
    pointers.out = job.out;
    pointers.indices = job.indices;
    const std::int64_t share = elements_per_thread(job.op);
    const std::int64_t useful = std::max<std::int64_t>(elements / share, 1);
    const auto threads = std::min<std::int64_t>(useful, job.threads);
    const int unit = job.form == Form::packed ? kPackedUnit : rule.block;
    for (const BlockGrid& grid : block_grids(job.axes, job.dim, unit, rule.block, job.form, pointers, sizeof(T))) {
        const std::int64_t piece = std::max<std::int64_t>(1, share / 4 / grid.elements_per_run());
        in_parallel(grid.runs(), piece, threads, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t i = first; i < last; ++i) kernel(grid.run(i), rule);
            finish_streaming();
        });
    }
    return true;
}

template bool prune<double>(const PruneJob&);
template bool prune<float>(const PruneJob&);
template bool prune<Half>(const PruneJob&);
template bool prune<BFloat16>(const PruneJob&);

}  // namespace nmcompile
