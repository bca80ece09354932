// One block at a time, step by step as nmcompile/pruning defines it, for the blocks that the SIMD kernels leave: those
// that are not finite or in which rounding moves a threshold. Compiled once, for the baseline of all machines.
#pragma once

#include <cstddef>

#include "machine/storage.h"
#include "prune/block_run.h"

namespace nmcompile {

// Strides in elements. `u` are the block's uniform numbers, one for mvue, two for mvue_approx.
template <class T>
struct ScalarBlock {
    const T* in;
    std::ptrdiff_t in_stride;
    T* out;
    std::ptrdiff_t out_stride;
    int block, n_keep;
    const float* u;
};

template <class T>
void scalar_mvue(const ScalarBlock<T>& block);

// 2:M.
template <class T>
void scalar_mvue_approx(const ScalarBlock<T>& block);

}  // namespace nmcompile
