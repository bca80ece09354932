// Chooses the instruction set, packs the sparse operand and spreads tiles of the result over threads.

#include "gemm/gemm.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "gemm/gemm_packing.h"
#include "machine/spare_memory.h"

namespace nmcompile {
namespace {

template <class T>
GemmKernel<T> kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::gemm_kernel<T>();
    if (isa == InstructionSet::v3) return v3::gemm_kernel<T>();
#endif
    return baseline::gemm_kernel<T>();
}

// Memory that a thread keeps between calls: the page faults of a fresh block would cost more than the packing.
class Scratch {
public:
    float* floats(std::int64_t count) {
        if (static_cast<std::size_t>(count) > memory_.count()) {
            memory_ = AlignedMemory<float>(0);  // frees the old block first, to never hold two at a time
            memory_ = AlignedMemory<float>(count);
        }
        return memory_.data();
    }

private:
    AlignedMemory<float> memory_{0};
};

constexpr std::int64_t kLargeFloats = 1 << 19;  // for which there are large pages: small ones miss caches more often
constexpr std::size_t kLargePacking = std::size_t{1} << 21;  // bytes

// Calls a function with memory to pack into; tasks have their own. Much memory is borrowed for the call only: a thread
// would keep what the largest of all gradients takes, while the activations take the most.
template <class Use>
bool with_packing_memory(std::int64_t floats, const Use& use) {
    const std::size_t bytes = floats * sizeof(float);
    if (bytes >= kLargePacking) {
        const Memory borrowed(bytes, Excess::any);
        return use(static_cast<float*>(borrowed.data()));
    }
    static thread_local Scratch scratch;
    return use(scratch.floats(floats));
}

float* task_memory(std::int64_t floats) {
    static thread_local Scratch scratch;
    return scratch.floats(std::max(floats, kLargeFloats));
}

template <class T>
bool multiply_all(GemmJob<T> job, const GemmKernel<T>& kernel, const KeptValues& kept, unsigned threads) {
    const Tasks tasks = tasks_of(job, kernel, threads);
    std::atomic<bool> is_finite = true;
    job.is_finite = &is_finite;
    in_parallel(tasks.count(), 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t row = i % tasks.along * tasks.rows, lane = i / tasks.along * tasks.lanes;
            const GemmTile tile{row, std::min(job.rows, row + tasks.rows), lane,
                                std::min(job.dense_lanes.size, lane + tasks.lanes)};
            const std::int64_t rows = tile.last_row - row, lanes = tile.last_lane - lane;
            const std::int64_t floats = kernel.scratch_floats(rows, lanes, job.dense_depth.size);
            kernel.multiply(job, kept, tile, task_memory(floats));
        }
    });
    return is_finite;
}

template <class T, class Pack>
bool pack_and_multiply(const GemmJob<T>& job, InstructionSet isa, unsigned threads, const Pack& pack) {
    const GemmKernel kernel = kernel_of<T>(isa);
    const std::int64_t depth = job.sparse_depth.size, values = kernel.values_of_block;
    return with_packing_memory(packed_floats(job.rows, depth, values), [&](float* memory) {
        const KeptValues kept = kept_in(memory, job.rows, depth, values);
        return pack(kernel, kept) && multiply_all(job, kernel, kept, threads);
    });
}

}  // namespace

PackedSparse::PackedSparse(std::int64_t rows, std::int64_t depth, std::int64_t values_of_block)
    : rows_(rows),
      depth_(depth),
      values_of_block_(values_of_block),
      memory_(packed_floats(rows, depth, values_of_block)) {}

KeptValues PackedSparse::kept() const { return kept_in(memory_.data(), rows_, depth_, values_of_block_); }

std::int64_t PackedSparse::bytes() const { return memory_.count() * sizeof(float); }

template <class T>
std::unique_ptr<PackedSparse> pack_sparse(const GemmJob<T>& job, InstructionSet isa, unsigned threads) {
    const GemmKernel kernel = kernel_of<T>(isa);
    auto packed = std::make_unique<PackedSparse>(job.rows, job.sparse_depth.size, kernel.values_of_block);
    return pack_all(job, kernel, packed->kept(), threads) ? std::move(packed) : nullptr;
}

template <class T>
bool gemm_packed(const GemmJob<T>& job, const PackedSparse& packed, InstructionSet isa, unsigned threads) {
    const GemmKernel kernel = kernel_of<T>(isa);
    if (kernel.values_of_block != packed.values_of_block()) {
        throw std::invalid_argument("the operand was packed for another type or instruction set");
    }
    return multiply_all(job, kernel, packed.kept(), threads);
}

template <class T>
bool gemm(const GemmJob<T>& job, InstructionSet isa, unsigned threads) {
    return pack_and_multiply(job, isa, threads, [&](const GemmKernel<T>& kernel, const KeptValues& kept) {
        return pack_all(job, kernel, kept, threads);
    });
}

template <class T>
bool gemm_pruned(const GemmJob<T>& job, Operator op, const Rule& rule, InstructionSet isa, unsigned threads) {
    const Pruning<T> pruning(job, op, rule, isa);
    return pack_and_multiply(job, isa, threads, [&](const GemmKernel<T>& kernel, const KeptValues& kept) {
        return pack_all(job, kernel, pruning, kept, threads);
    });
}

template bool gemm<float>(const GemmJob<float>&, InstructionSet, unsigned);
template bool gemm<BFloat16>(const GemmJob<BFloat16>&, InstructionSet, unsigned);
template bool gemm_pruned<float>(const GemmJob<float>&, Operator, const Rule&, InstructionSet, unsigned);
template bool gemm_pruned<BFloat16>(const GemmJob<BFloat16>&, Operator, const Rule&, InstructionSet, unsigned);
template bool gemm_packed<float>(const GemmJob<float>&, const PackedSparse&, InstructionSet, unsigned);
template bool gemm_packed<BFloat16>(const GemmJob<BFloat16>&, const PackedSparse&, InstructionSet, unsigned);
template std::unique_ptr<PackedSparse> pack_sparse<float>(const GemmJob<float>&, InstructionSet, unsigned);
template std::unique_ptr<PackedSparse> pack_sparse<BFloat16>(const GemmJob<BFloat16>&, InstructionSet, unsigned);

}  // namespace nmcompile
