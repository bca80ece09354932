// The blocks of a strided tensor as runs, in the memory order of the output.
#pragma once

#include <cstdint>
#include <vector>

#include "prune/block_run.h"

namespace nmcompile {

// A dim of a tensor. Strides in elements, and in bytes for the indices of a packed output, else zero.
struct Axis {
    std::int64_t size, in_stride, out_stride, index_stride;
};

// A dim of the grid of units: strides from unit to unit, also in block numbers.
struct GridDim {
    std::int64_t size, in, out, index;
    std::uint64_t number;
};

// Units of equal length: either all full ones, or the partial last ones along the dim.
class BlockGrid {
   public:
    // `first` has pointers, strides along a unit and numbers; strides from unit to unit follow from the dims.
    BlockGrid(std::vector<GridDim> dims, const Run& first, std::int64_t in_size, std::int64_t out_size,
              std::int64_t unit);

    std::int64_t runs() const;
    Run run(std::int64_t index) const;
    std::int64_t elements_per_run() const { return lanes_per_run_ * first_.length; }

   private:
    std::vector<GridDim> outer_;  // all dims except those of a row of lanes
    Run first_;                   // the first row, with all its lanes
    std::int64_t in_size_, out_size_, lanes_per_run_, runs_per_row_;  // sizes of an element in bytes
};

// `unit` elements along `axes[dim]` are a lane; they hold `unit / block` blocks. `run` has the pointers; `element_size`
// is that of the input.
std::vector<BlockGrid> block_grids(const std::vector<Axis>& axes, std::size_t dim, int unit, int block, Form form,
                                   const Run& pointers, std::int64_t element_size);

}  // namespace nmcompile
