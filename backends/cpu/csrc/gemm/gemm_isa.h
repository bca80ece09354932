// The sparse GEMM as compiled for each instruction set (see gemm_isa.cpp).
#pragma once

#include <cstdint>

#include "gemm/gemm.h"

namespace nmcompile {

constexpr std::int64_t kPackedRows = 32;  // rows that are packed together

struct GemmTile {
    std::int64_t first_row, last_row, first_lane, last_lane;
};

template <class T>
struct GemmKernel {
    std::int64_t vector_lanes, panel_lanes;  // of a panel at most; all its vectors are whole except the last one
    std::int64_t most_panels;                // of a tile
    std::int64_t values_of_block;            // values that a row keeps of a block of depth
    // Packs one block of depth of the rows from `row` on; returns false if some four keep more than two or are not finite.
    bool (*pack)(const GemmJob<T>& job, const KeptValues& kept, std::int64_t block, std::int64_t row);
    // Computes C for a tile. `scratch` holds `scratch_floats` for its rows, lanes and depth, aligned to 64 bytes.
    void (*multiply)(const GemmJob<T>& job, const KeptValues& kept, const GemmTile& tile, float* scratch);
    std::int64_t (*scratch_floats)(std::int64_t rows, std::int64_t lanes, std::int64_t depth);
};

namespace baseline {
template <class T>
GemmKernel<T> gemm_kernel();
}
#if defined(__x86_64__)
namespace v3 {
template <class T>
GemmKernel<T> gemm_kernel();
}
namespace v4 {
template <class T>
GemmKernel<T> gemm_kernel();
}
#endif

}  // namespace nmcompile
