// Walks a strided tensor strip by strip, in the order of the output's memory, on several threads.

#include "mvue.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "mvue_block.h"
#include "mvue_strip.h"
#include "philox.h"
#include "storage.h"

namespace nmcompile {
namespace {

using Index = std::int64_t;

constexpr Index kElementsPerThread = 1 << 15;  // a thread costs about as long to start as these take to prune

// One dim of the grid of blocks: strides from block to block, in elements and in block numbers.
struct Dim {
    Index size, in, out, number;
};

// Equally long blocks: all full ones, or the partial last ones, which equal shorter blocks without their padding.
struct Grid {
    std::vector<Dim> dims;  // the last one has the smallest output stride and becomes the lanes
    Index in_offset, out_offset, first_number;
    Index in_stride, out_stride;  // from element to element
    int block;
};

// Drops dims of size 1, orders the others as the output lies in memory, and merges those that act as one.
std::vector<Dim> merge(std::vector<Dim> dims) {
    std::erase_if(dims, [](const Dim& dim) { return dim.size == 1; });
    std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.out > b.out; });
    std::vector<Dim> merged;
    for (const Dim& dim : dims) {
        if (!merged.empty()) {
            Dim& outer = merged.back();
            const auto spans = [&](Index Dim::*stride) { return outer.*stride == dim.*stride * dim.size; };
            if (spans(&Dim::in) && spans(&Dim::out) && spans(&Dim::number)) {
                outer = {outer.size * dim.size, dim.in, dim.out, dim.number};
                continue;
            }
        }
        merged.push_back(dim);
    }
    if (merged.empty()) merged.push_back({1, 0, 0, 0});
    return merged;
}

std::vector<Grid> grids(const std::vector<Axis>& axes, std::size_t dim, int block) {
    const Axis& along = axes[dim];
    const Index full = along.size / block, partial = along.size % block;
    std::vector<Dim> others;
    Index number = 1, along_number = 1;
    for (std::size_t i = axes.size(); i-- > 0;) {
        if (i == dim) {
            along_number = number;
            number *= full + (partial > 0);
        } else {
            others.push_back({axes[i].size, axes[i].in_stride, axes[i].out_stride, number});
            number *= axes[i].size;
        }
    }
    std::reverse(others.begin(), others.end());
    std::vector<Grid> result;
    if (partial > 0) {
        result.push_back({merge(others), full * block * along.in_stride, full * block * along.out_stride,
                          full * along_number, along.in_stride, along.out_stride, static_cast<int>(partial)});
    }
    if (full > 0) {
        others.push_back({full, along.in_stride * block, along.out_stride * block, along_number});
        result.push_back({merge(others), 0, 0, 0, along.in_stride, along.out_stride, block});
    }
    return result;
}

template <class T>
class Pruner {
   public:
    Pruner(const T* in, T* out, const Grid& grid, int n_keep, std::uint64_t key)
        : grid_(grid),
          in_(in + grid.in_offset),
          out_(out + grid.out_offset),
          n_keep_(n_keep),
          key_(key),
          strips_per_row_((grid.dims.back().size + kLanes - 1) / kLanes) {}

    Index strips() const {
        Index count = strips_per_row_;
        for (std::size_t i = 0; i + 1 < grid_.dims.size(); ++i) count *= grid_.dims[i].size;
        return count;
    }

    void run(Index first, Index last) {
        for (Index strip = first; strip < last; ++strip) {
            const Dim& lanes = grid_.dims.back();
            const Index lane = strip % strips_per_row_ * kLanes;
            Index row = strip / strips_per_row_;
            Index in = lane * lanes.in, out = lane * lanes.out, number = grid_.first_number + lane * lanes.number;
            for (std::size_t i = grid_.dims.size() - 1; i-- > 0;) {
                const Dim& dim = grid_.dims[i];
                const Index index = row % dim.size;
                row /= dim.size;
                in += index * dim.in;
                out += index * dim.out;
                number += index * dim.number;
            }
            const auto count = static_cast<int>(std::min<Index>(kLanes, lanes.size - lane));
            prune(in_ + in, out_ + out, static_cast<std::uint64_t>(number), count);
        }
    }

   private:
    using Real = typename Arithmetic<T>::Real;

    void prune(const T* in, T* out, std::uint64_t number, int count) {
        const Dim& lanes = grid_.dims.back();
        alignas(64) Rows<Real> x, y;
        alignas(64) Real u[kLanes] = {};
        bool redo[kLanes];
        uniforms(key_, number, static_cast<std::uint64_t>(lanes.number), count, u);
        load(in, count, x);
        const bool any_redo = prune_strip<Real>(x, y, u, redo, n_keep_, grid_.block);
        store(y, count, out);
        if (!any_redo) return;
        for (int l = 0; l < count; ++l) {
            if (!redo[l]) continue;
            prune_block(in + l * lanes.in, grid_.in_stride, out + l * lanes.out, grid_.out_stride, grid_.block, n_keep_,
                        u[l]);
        }
    }

    void load(const T* in, int count, Rows<Real>& x) const {
        const Index stride = grid_.dims.back().in;
        for (int i = 0; i < grid_.block; ++i, in += grid_.in_stride) {
            if (stride == 1 && count == kLanes) {
                for (int l = 0; l < kLanes; ++l) x[i][l] = widen(in[l]);
            } else {
                for (int l = 0; l < count; ++l) x[i][l] = widen(in[l * stride]);
                for (int l = count; l < kLanes; ++l) x[i][l] = 0;
            }
        }
    }

    void store(const Rows<Real>& y, int count, T* out) const {
        const Index stride = grid_.dims.back().out;
        for (int i = 0; i < grid_.block; ++i, out += grid_.out_stride) {
            if (stride == 1 && count == kLanes) {
                for (int l = 0; l < kLanes; ++l) out[l] = narrow<T>(y[i][l]);
            } else {
                for (int l = 0; l < count; ++l) out[l * stride] = narrow<T>(y[i][l]);
            }
        }
    }

    const Grid& grid_;
    const T* in_;
    T* out_;
    int n_keep_;
    std::uint64_t key_;
    Index strips_per_row_;
};

// Calls `work(first, last)` for pieces of [0, count); what no thread can be started for runs here.
template <class Work>
void in_parallel(Index count, Index threads, const Work& work) {
    std::vector<std::thread> started;
    Index first = 0;
    for (Index t = 1; t < threads; ++t) {
        const Index last = count * t / threads;
        try {
            started.emplace_back(work, first, last);
        } catch (const std::system_error&) {
            break;
        }
        first = last;
    }
    work(first, count);
    for (std::thread& thread : started) thread.join();
}

}  // namespace

template <class T>
void mvue(const T* in, T* out, const std::vector<Axis>& axes, std::size_t dim, int n_keep, int block,
          std::uint64_t key, unsigned threads) {
    Index elements = 1;
    for (const Axis& axis : axes) elements *= axis.size;
    if (elements == 0) return;
    for (const Grid& grid : grids(axes, dim, block)) {
        Pruner<T> pruner(in, out, grid, n_keep, key);
        const Index strips = pruner.strips();
        const Index useful = strips * kLanes * grid.block / kElementsPerThread;
        in_parallel(strips, std::clamp<Index>(useful, 1, std::max(1u, threads)),
                    [&](Index first, Index last) { pruner.run(first, last); });
    }
}

template void mvue(const double*, double*, const std::vector<Axis>&, std::size_t, int, int, std::uint64_t, unsigned);
template void mvue(const float*, float*, const std::vector<Axis>&, std::size_t, int, int, std::uint64_t, unsigned);
template void mvue(const Half*, Half*, const std::vector<Axis>&, std::size_t, int, int, std::uint64_t, unsigned);
template void mvue(const BFloat16*, BFloat16*, const std::vector<Axis>&, std::size_t, int, int, std::uint64_t,
                   unsigned);

}  // namespace nmcompile
