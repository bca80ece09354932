// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "transposable/transposable_isa.h"

#include "transposable/panel_walker.h"

namespace nmcompile::NMCOMPILE_ISA {

template <class T>
PanelKernel panel_kernel() {
    return {
        [](const TransposableJob& job) { return PanelWalker<T>(job).panels(); },
        [](const TransposableJob& job, Index first, Index last) { PanelWalker<T>(job).run(first, last); },
        8 * kPanelColumns<T>,
    };
}

template PanelKernel panel_kernel<double>();
template PanelKernel panel_kernel<float>();
template PanelKernel panel_kernel<Half>();
template PanelKernel panel_kernel<BFloat16>();

}  // namespace nmcompile::NMCOMPILE_ISA
