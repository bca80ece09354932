// Packs the sparse operand on all threads, either as is or pruned on the way.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "gemm/gemm_isa.h"
#include "gemm/gemm_tasks.h"
#include "machine/parallel.h"
#include "prune/prune_isa.h"

namespace nmcompile {

inline std::int64_t depth_blocks(std::int64_t depth) { return pieces(depth, kDepthBlock); }

// Values come first, then their places.
inline std::int64_t packed_floats(std::int64_t rows, std::int64_t depth, std::int64_t values_of_block) {
    const std::int64_t kept = depth_blocks(depth) * rows * values_of_block;
    return kept + pieces(kept, sizeof(float));
}

inline KeptValues kept_in(float* data, std::int64_t rows, std::int64_t depth, std::int64_t values_of_block) {
    return {data, reinterpret_cast<std::uint8_t*>(data + depth_blocks(depth) * rows * values_of_block)};
}

template <class T>
bool pack_all(const GemmJob<T>& job, const GemmKernel<T>& kernel, const KeptValues& kept, unsigned threads) {
    const std::int64_t blocks = depth_blocks(job.sparse_depth.size), groups = pieces(job.rows, kPackedRows);
    std::atomic<bool> fits = true;
    // Packs all blocks of the same rows one after the other: data that share cache lines stay in the cache.
    in_parallel(groups, 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first * blocks; i < last * blocks; ++i) {
            if (!kernel.pack(job, kept, i % blocks, i / blocks * kPackedRows)) fits = false;
        }
    });
    return fits;
}

// Rows that are pruned together: random numbers are computed for 96 blocks at a time, for 48 without AVX-512.
constexpr std::int64_t kPrunedRows = 6 * kPackedRows;

// How a matrix (depth, rows) with contiguous rows is pruned along depth.
template <class T>
class Pruning {
public:
    Pruning(const GemmJob<T>& job, Operator op, const Rule& rule, InstructionSet isa)
        : job_(job), rule_(rule), kernel_(prune_kernel<T>(op, Form::values, rule, isa)) {
        int digits = 0;
        for (const Digit& digit : job.sparse_depth.digits) {
            if (digit.size > 1) step_ = digit.step.offset, ++digits;
        }
        if (kernel_ == nullptr || job.sparse_row != 1 || digits > 1 || kDepthBlock % rule.block != 0) {
            throw std::invalid_argument("this operand cannot be pruned while it is packed");
        }
    }

    // Writes a block of depth from `row` on to `to`, with kPrunedRows from one element of depth to the next.
    void run(std::int64_t block, std::int64_t row, T* to) const {
        Run run{};
        run.out = to;
        run.in_stride = step_;
        run.out_stride = kPrunedRows;
        run.in_lane = run.out_lane = run.number_inner = 1;
        run.count = run.inner = std::min(kPrunedRows, job_.rows - row);
        const std::int64_t last = std::min(job_.sparse_depth.size, (block + 1) * kDepthBlock);
        for (std::int64_t k = block * kDepthBlock; k < last; k += rule_.block, to += rule_.block * kPrunedRows) {
            run.in = job_.sparse + job_.sparse_depth.start.offset + k * step_ + row;
            run.out = to;
            run.length = std::min<std::int64_t>(rule_.block, last - k);
            run.number = k / rule_.block * job_.rows + row;
            kernel_(run, rule_);
        }
    }

    // Returns the job with its operand replaced by the values that `run` has written.
    GemmJob<T> pruned(std::int64_t block, std::int64_t row, const T* from) const {
        GemmJob<T> job = job_;
        job.sparse = from;
        for (Digit& digit : job.sparse_depth.digits) digit.step.offset = kPrunedRows;
        job.sparse_depth.start.offset = -block * kDepthBlock * kPrunedRows - row;
        return job;
    }

private:
    const GemmJob<T>& job_;
    Rule rule_;
    PruneKernel kernel_;
    std::int64_t step_ = 0;
};

template <class T>
bool pack_all(const GemmJob<T>& job, const GemmKernel<T>& kernel, const Pruning<T>& pruning, const KeptValues& kept,
              unsigned threads) {
    const std::int64_t blocks = depth_blocks(job.sparse_depth.size), groups = pieces(job.rows, kPrunedRows);
    std::atomic<bool> fits = true;
    in_parallel(groups, 1, threads, [&](std::int64_t first, std::int64_t last) {
        alignas(64) T some[kDepthBlock * kPrunedRows];
        for (std::int64_t i = first * blocks; i < last * blocks; ++i) {
            const std::int64_t block = i % blocks, begin = i / blocks * kPrunedRows;
            pruning.run(block, begin, some);
            const GemmJob<T> pruned = pruning.pruned(block, begin, some);
            for (std::int64_t row = begin; row < std::min(job.rows, begin + kPrunedRows); row += kPackedRows) {
                if (!kernel.pack(pruned, kept, block, row)) fits = false;
            }
        }
    });
    return fits;
}

}  // namespace nmcompile
