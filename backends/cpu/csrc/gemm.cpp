// Chooses the instruction set, packs the sparse operand and spreads tiles of the result over threads.

#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "gemm_isa.h"
#include "parallel.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kLine = 64;           // bytes
constexpr std::int64_t kMostRows = 1024;     // whose sums stay in a cache of the second level
constexpr std::int64_t kFewestRows = 128;    // that are worth a panel of their own
constexpr std::int64_t kTasksPerThread = 8;  // so that the last of them does not leave the others waiting for long

GemmKernel kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::gemm_kernel();
    if (isa == InstructionSet::v3) return v3::gemm_kernel();
#endif
    return baseline::gemm_kernel();
}

// Memory that a thread keeps between calls: the pages of a fresh block would cost more than the packing.
class Scratch {
public:
    float* floats(std::int64_t count) {
        if (count > size_) {
            data_.reset();
            data_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(kLine))));
            size_ = count;
        }
        return data_.get();
    }

private:
    struct Free {
        void operator()(float* data) const { ::operator delete(data, std::align_val_t(kLine)); }
    };
    std::unique_ptr<float, Free> data_;
    std::int64_t size_ = 0;
};

std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// As few tiles as there can be, of about the same size: a narrow one would leave the multiplier waiting.
std::int64_t lanes_of_a_tile(std::int64_t lanes, const GemmKernel& kernel) {
    return pieces(pieces(lanes, pieces(lanes, kernel.most_lanes)), kernel.vector_lanes) * kernel.vector_lanes;
}

std::int64_t rows_of_a_task(const GemmJob& job, std::int64_t tiles, std::int64_t threads) {
    const std::int64_t wanted = threads <= 1 ? 1 : pieces(kTasksPerThread * threads, tiles);
    return std::min(kMostRows, std::max(kFewestRows, pieces(job.rows, wanted)));
}

}  // namespace

bool gemm(const GemmJob& job, InstructionSet isa, unsigned threads) {
    const GemmKernel kernel = kernel_of(isa);
    const std::int64_t blocks = pieces(job.sparse_depth.size, kDepthBlock), kept_count = blocks * job.rows * kKeptOfBlock;
    static thread_local Scratch packed;
    KeptValues kept{packed.floats(kept_count + pieces(kept_count, sizeof(float))), nullptr};
    kept.places = reinterpret_cast<std::uint8_t*>(kept.values + kept_count);

    const std::int64_t groups = pieces(job.rows, kPackedRows);
    std::atomic<bool> fits = true;
    // All blocks of the same rows, one after the other: what shares cache lines stays in a cache.
    in_parallel(groups, 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first * blocks; i < last * blocks; ++i) {
            if (!kernel.pack(job, kept, i % blocks, i / blocks * kPackedRows)) fits = false;
        }
    });
    if (!fits) return false;

    const std::int64_t lanes = lanes_of_a_tile(job.dense_lanes.size, kernel);
    const std::int64_t tiles = pieces(job.dense_lanes.size, lanes);
    const std::int64_t rows = rows_of_a_task(job, tiles, threads), parts = pieces(job.rows, rows);
    in_parallel(tiles * parts, 1, threads, [&](std::int64_t first, std::int64_t last) {
        static thread_local Scratch scratch;
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t row = i % parts * rows, lane = i / parts * lanes;
            const GemmTile tile{row, std::min(job.rows, row + rows), lane, std::min(job.dense_lanes.size, lane + lanes)};
            kernel.multiply(job, kept, tile, scratch.floats(kernel.scratch_floats(rows)));
        }
    });
    return true;
}

}  // namespace nmcompile
