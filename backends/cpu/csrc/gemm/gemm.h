// Products of a 2:4 sparse matrix and a dense one: C[row, lane] = sum over depth of S[row, depth] * D[depth, lane].
//
// D may be an image read through a kernel window: an element of it lies at the sum of the offsets of its depth and of
// its lane, and is zero where the sum of their places is outside the image. So one kernel runs the three GEMMs of linear
// layers and of convolutions; which axis is what, nmcompile/backends/cpu/contraction.py says.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "machine/aligned_memory.h"
#include "machine/instruction_sets.h"
#include "machine/storage.h"
#include "prune/block_run.h"

namespace nmcompile {

constexpr int kDepthBlock = 64;  // elements of depth that one panel holds
constexpr int kMaxDigits = 4;

// S without its zeros: for each block of depth and each row, the values that it keeps and their places in a panel. What
// a value is, a float or two neighbours in bfloat16, and how many there are, the kernel says.
struct KeptValues {
    float* values;
    std::uint8_t* places;
};

// Where one index of an axis is: an offset in elements and a place in the image.
struct Point {
    std::int64_t offset;
    std::int32_t y, x;
};

struct Digit {
    std::int64_t size;
    Point step;
};

// An axis whose index counts in mixed radix, the last digit fastest. Digits that are not used have size 1.
struct GemmAxis {
    Digit digits[kMaxDigits];
    Point start;
    std::int64_t size;  // the product of the digits' sizes
};

// T is float or BFloat16; sums are in float32.
template <class T>
struct GemmJob {
    std::int64_t rows;
    const T* sparse;  // at most two non-zeros in each four consecutive elements of depth
    const std::uint8_t* mask;  // or null: elements that are to be taken for zeros, at the same offsets
    std::int64_t sparse_row;
    GemmAxis sparse_depth;

    const T* dense;
    GemmAxis dense_depth, dense_lanes;
    std::int32_t height, width;

    T* output;
    std::int64_t output_row;
    GemmAxis output_lanes;
    const T* bias;  // one for each row, or null

    std::atomic<bool>* is_finite;  // set to false where D is not
};

// S without its zeros, packed once for many products with operands of the same type.
class PackedSparse {
public:
    PackedSparse(std::int64_t rows, std::int64_t depth, std::int64_t values_of_block);
    KeptValues kept() const;
    std::int64_t rows() const { return rows_; }
    std::int64_t depth() const { return depth_; }
    std::int64_t values_of_block() const { return values_of_block_; }
    std::int64_t bytes() const;

private:
    std::int64_t rows_, depth_, values_of_block_;
    AlignedMemory<float> memory_;
};

// Zeros of S are skipped and those around images are read, so S and D have to be finite: a dense product yields NaN where
// infinity or NaN meets a zero.

// Null where S is not finite or has more than two non-zeros in some four. Only S and its axes are read of the job.
template <class T>
std::unique_ptr<PackedSparse> pack_sparse(const GemmJob<T>& job, InstructionSet isa, unsigned threads);

// The product of the packed S; nothing of S is read of the job but its sizes. False where D is not finite; C is then not
// the product. Throws std::invalid_argument where S was packed for another kernel.
template <class T>
bool gemm_packed(const GemmJob<T>& job, const PackedSparse& packed, InstructionSet isa, unsigned threads);

// False where S or D is not finite or S has more than two non-zeros in some four; C is then not the product. Sums run along
// depth in one order, whatever the number of threads.
template <class T>
bool gemm(const GemmJob<T>& job, InstructionSet isa, unsigned threads);

// The same with an S that is pruned while it is packed: in blocks of consecutive elements of depth, numbered for the random
// numbers as those of a matrix (depth, rows). Rows lie side by side, and depth is a single digit; else, or where there is
// no kernel for the operator, std::invalid_argument is thrown.
template <class T>
bool gemm_pruned(const GemmJob<T>& job, Operator op, const Rule& rule, InstructionSet isa, unsigned threads);

}  // namespace nmcompile
