#include "prune/block_grid.h"

#include <algorithm>
#include <utility>

namespace nmcompile {
namespace {

using Index = std::int64_t;

constexpr Index kElementsPerRun = 1 << 14;
constexpr Index kLaneMultiple = 64;  // runs of a row start at whole vectors
constexpr Index kFewLanes = 16;

bool spans_memory(const GridDim& outer, const GridDim& inner) {
    return outer.in == inner.in * inner.size && outer.out == inner.out * inner.size &&
           outer.index == inner.index * inner.size;
}

bool spans_numbers(const GridDim& outer, const GridDim& inner) {
    return outer.number == inner.number * static_cast<std::uint64_t>(inner.size);
}

// Drops dims of size 1, orders the others by their strides in the output, and merges those that act as one.
std::vector<GridDim> merge(std::vector<GridDim> dims) {
    std::erase_if(dims, [](const GridDim& dim) { return dim.size == 1; });
    std::stable_sort(dims.begin(), dims.end(), [](const GridDim& a, const GridDim& b) { return a.out > b.out; });
    std::vector<GridDim> merged;
    for (GridDim dim : dims) {
        if (!merged.empty() && spans_memory(merged.back(), dim) && spans_numbers(merged.back(), dim)) {
            dim.size *= merged.back().size;
            merged.pop_back();
        }
        merged.push_back(dim);
    }
    if (merged.empty()) merged.push_back({1, 0, 0, 0, 0});
    return merged;
}

}  // namespace

BlockGrid::BlockGrid(std::vector<GridDim> dims, const Run& first, Index in_size, Index out_size, Index unit)
    : outer_(merge(std::move(dims))), first_(first), in_size_(in_size), out_size_(out_size) {
    // The lanes are those of the innermost dim, unless these are few.
    if (outer_.back().size < kFewLanes) {
        const auto shorter = [](const GridDim& a, const GridDim& b) { return a.size < b.size; };
        const auto longest = std::max_element(outer_.begin(), outer_.end(), shorter);
        std::rotate(longest, longest + 1, outer_.end());
    }
    const GridDim lanes = outer_.back();
    outer_.pop_back();
    first_.in_lane = lanes.in;
    first_.out_lane = lanes.out;
    first_.index_lane = lanes.index;
    first_.count = first_.inner = lanes.size;
    first_.number_inner = lanes.number;
    first_.number_outer = 0;
    // Lanes that continue into the next dim in memory, but not in the numbers of their blocks.
    if (!outer_.empty() && spans_memory(outer_.back(), lanes)) {
        first_.count *= outer_.back().size;
        first_.number_outer = outer_.back().number;
        outer_.pop_back();
    }
    lanes_per_run_ = std::max(kElementsPerRun / unit / kLaneMultiple * kLaneMultiple, kLaneMultiple);
    runs_per_row_ = (first_.count + lanes_per_run_ - 1) / lanes_per_run_;
    lanes_per_run_ = std::min(lanes_per_run_, first_.count);
}

Index BlockGrid::runs() const {
    Index count = runs_per_row_;
    for (const GridDim& dim : outer_) count *= dim.size;
    return count;
}

Run BlockGrid::run(Index index) const {
    Run run = first_;
    run.first = index % runs_per_row_ * lanes_per_run_;
    run.count = std::min(lanes_per_run_, first_.count - run.first);
    Index row = index / runs_per_row_;
    Index in = run.first * run.in_lane, out = run.first * run.out_lane, at_index = run.first * run.index_lane;
    for (std::size_t i = outer_.size(); i-- > 0;) {
        const GridDim& dim = outer_[i];
        const Index place = row % dim.size;
        row /= dim.size;
        in += place * dim.in;
        out += place * dim.out;
        at_index += place * dim.index;
        run.number += static_cast<std::uint64_t>(place) * dim.number;
    }
    run.in = static_cast<const char*>(run.in) + in * in_size_;
    run.out = static_cast<char*>(run.out) + out * out_size_;
    if (run.indices != nullptr) run.indices += at_index;
    return run;
}

std::vector<BlockGrid> block_grids(const std::vector<Axis>& axes, std::size_t dim, int unit, int block, Form form,
                                   const Run& pointers, Index element_size) {
    const Axis& along = axes[dim];
    const bool packed = form == Form::packed;
    const Index out_size = form == Form::mask ? 1 : element_size;
    const Index full = along.size / unit, partial = along.size % unit, out_unit = packed ? unit / 2 : unit;
    const Index blocks = (along.size + block - 1) / block;
    std::vector<GridDim> dims;
    std::uint64_t number = 1, number_block = 1;
    for (std::size_t i = axes.size(); i-- > 0;) {
        if (i == dim) {
            number_block = number;
            number *= static_cast<std::uint64_t>(blocks);
        } else {
            dims.push_back({axes[i].size, axes[i].in_stride, axes[i].out_stride, axes[i].index_stride, number});
            number *= static_cast<std::uint64_t>(axes[i].size);
        }
    }
    std::reverse(dims.begin(), dims.end());

    Run run = pointers;
    run.in_stride = along.in_stride;
    run.out_stride = along.out_stride;
    run.number = 0;
    run.number_block = number_block;
    const std::uint64_t number_unit = number_block * static_cast<std::uint64_t>(unit / block);
    std::vector<BlockGrid> result;
    if (partial > 0) {
        Run last = run;
        last.in = static_cast<const char*>(run.in) + full * unit * along.in_stride * element_size;
        last.out = static_cast<char*>(run.out) + full * out_unit * along.out_stride * out_size;
        if (packed) last.indices += full * along.index_stride;
        last.length = partial;
        last.number = static_cast<std::uint64_t>(full) * number_unit;
        result.emplace_back(dims, last, element_size, out_size, unit);
    }
    if (full > 0) {
        run.length = unit;
        dims.push_back({full, along.in_stride * unit, along.out_stride * out_unit, along.index_stride, number_unit});
        result.emplace_back(dims, run, element_size, out_size, unit);
    }
    return result;
}

}  // namespace nmcompile
