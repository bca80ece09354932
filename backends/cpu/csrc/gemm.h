// Products of a 2:4 sparse matrix and a dense one: C[row, lane] = sum over depth of S[row, depth] * D[depth, lane].
//
// D may be an image read through a kernel window: an element of it lies at the sum of the offsets of its depth and of
// its lane, and is zero where the sum of their places is outside the image. So one kernel runs the three GEMMs of linear
// layers and of convolutions; which axis is what, nmcompile/backends/cpu/contraction.py says.
#pragma once

#include <cstdint>
#include <vector>

#include "instruction_sets.h"

namespace nmcompile {

constexpr int kDepthBlock = 64;                 // elements of depth that one panel holds
constexpr int kKeptOfBlock = kDepthBlock / 2;   // values that a row keeps of them
constexpr int kMaxDigits = 4;

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

struct GemmJob {
    std::int64_t rows;
    const float* sparse;  // at most two non-zeros in each four consecutive elements of depth
    const std::uint8_t* mask;  // or null: elements that are to be taken for zeros, at the same offsets
    std::int64_t sparse_row;
    GemmAxis sparse_depth;

    const float* dense;
    GemmAxis dense_depth, dense_lanes;
    std::int32_t height, width;

    float* output;
    std::int64_t output_row;
    GemmAxis output_lanes;
    const float* bias;  // one for each row, or null
};

// False where S has more than two non-zeros in some four; C is then not written. Sums run along depth in one order,
// whatever the number of threads.
bool gemm(const GemmJob& job, InstructionSet isa, unsigned threads);

}  // namespace nmcompile
