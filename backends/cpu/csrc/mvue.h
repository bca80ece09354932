#pragma once

#include <cstdint>
#include <vector>

namespace nmcompile {

struct Axis {
    std::int64_t size, in_stride, out_stride;  // strides in elements
};

// The exact minimum-variance unbiased estimator for any N:M with 1 <= N < M <= kMaxBlock along `axes[dim]`, equal to
// nmcompile/pruning/mvue.py bit for bit. T is double, float, Half or BFloat16 (storage.h).
template <class T>
void mvue(const T* in, T* out, const std::vector<Axis>& axes, std::size_t dim, int n_keep, int block,
          std::uint64_t key, unsigned threads);

}  // namespace nmcompile
