// Chooses the instruction set and spreads the panels over threads.

#include "transposable/transposable.h"

#include <algorithm>

#include "machine/parallel.h"
#include "machine/storage.h"
#include "transposable/transposable_isa.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kElementsPerPiece = 1 << 15;  // pruning them takes about as long as the start of a thread

template <class T>
PanelKernel kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::panel_kernel<T>();
    if (isa == InstructionSet::v3) return v3::panel_kernel<T>();
#endif
    return baseline::panel_kernel<T>();
}

}  // namespace

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
