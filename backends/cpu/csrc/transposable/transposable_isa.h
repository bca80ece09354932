// The transposable mask as compiled for each instruction set (see transposable_isa.cpp).
#pragma once

#include <cstdint>

#include "transposable/transposable.h"

namespace nmcompile {

// Panels are the pieces of a job that can be done in any order and concurrently.
struct PanelKernel {
    std::int64_t (*count)(const TransposableJob& job);
    void (*run)(const TransposableJob& job, std::int64_t first, std::int64_t last);
    std::int64_t elements;  // elements per panel
};

namespace baseline {
template <class T>
PanelKernel panel_kernel();
}
#if defined(__x86_64__)
namespace v3 {
template <class T>
PanelKernel panel_kernel();
}
namespace v4 {
template <class T>
PanelKernel panel_kernel();
}
#endif

}  // namespace nmcompile
