// Products of a 2:4 matrix of 4-bit integers and a few tokens, for which reading the matrix is what takes time:
//
//     Y[token, row] = step[row] * (sum over depth of Q[row, depth] * X[token, depth]) + bias[row]
//
// Each four of depth takes twelve bits: two integers of four bits, and two bits each for their places. A block has four
// rows and kBlockDepth of depth, in steps of sixteen. It is three times sixteen words: places, the integers of the first
// two rows, and those of the others. Lane l of sixteen has, of every step, the four elements l / 4, the row l / 2 % 2 of
// two, and the first or the second that is kept, l % 2: so one permutation within four floats fetches what sixteen lanes
// multiply, and a shift brings the next step's bits to where it reads them.
//
//     places    bits 2 * (8 * (row / 2) + step) and up of a word, from 0 to 3
//     integers  bits 4 * step and up, in two's complement
#pragma once

#include <cstdint>
#include <memory>

#include "instruction_sets.h"

namespace nmcompile {

constexpr int kBlockRows = 4;
constexpr int kBlockDepth = 128;
constexpr int kStepDepth = 16;
constexpr int kStepLanes = 16;
constexpr int kBlockWords = 3 * kStepLanes;

class PackedIntegers {
public:
    PackedIntegers(std::int64_t rows, std::int64_t depth);
    std::uint32_t* words() const { return words_.get(); }  // block after block of the same rows
    std::int64_t rows() const { return rows_; }
    std::int64_t depth() const { return depth_; }
    std::int64_t blocks() const { return (depth_ + kBlockDepth - 1) / kBlockDepth; }  // side by side
    std::int64_t bytes() const;

private:
    struct Free {
        void operator()(std::uint32_t* words) const;
    };
    std::int64_t rows_, depth_;
    std::unique_ptr<std::uint32_t, Free> words_;
};

struct IntegersJob {
    const std::uint32_t* words;
    std::int64_t rows, blocks;
    const float* input;  // tokens x blocks * kBlockDepth
    std::int64_t tokens;
    const float* steps;  // one for each row
    const float* bias;   // one for each row, or null
    float* output;       // tokens x rows
};

// Rows x depth, depth a multiple of four. Null where some four keep more than two, or four bits do not hold an integer.
std::unique_ptr<PackedIntegers> pack_integers(const std::int8_t* integers, std::int64_t rows, std::int64_t depth,
                                              unsigned threads);

// Sums run in one order, whatever the number of threads.
void multiply_integers(const IntegersJob& job, InstructionSet isa, unsigned threads);

}  // namespace nmcompile
