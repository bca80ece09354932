// Products of a 2:4 matrix of 4-bit integers and the integers of a few tokens, exact in 32 bits. With few tokens, most
// of the time goes into reading the matrix:
//
//     Y[token, row] = step[row] * (sum over depth of Q[row, depth] * K[token, depth]) + bias[row]
//
// Each four of depth takes twelve bits: two integers of four bits, and two bits each for their places. A block has four
// rows and kBlockDepth of depth. It is three times 64 bytes: places, the integers of the first two rows, and those of
// the other two. Byte l of 64 belongs to the four l / 16 * 4 + l % 8 / 2 of half a block, to the row l / 8 % 2 of two,
// and to the first or the second kept integer, l % 2. So one permutation of bytes within sixteen fetches the factors of
// a vector, and the products that are added side by side belong to one row.
//
//     places    bits 2 * (2 * (row / 2) + half) and up of a byte, from 0 to 3
//     integers  bits 4 * half and up, in two's complement
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "machine/aligned_memory.h"
#include "machine/instruction_sets.h"

namespace nmcompile {

constexpr int kBlockRows = 4;
constexpr int kBlockDepth = 128;
constexpr int kLaneBytes = 64;
constexpr int kBlockBytes = 3 * kLaneBytes;
constexpr std::int64_t kMostDepth = 1 << 20;  // far from where sums would overflow 32 bits

class PackedIntegers {
public:
    PackedIntegers(std::int64_t rows, std::int64_t depth);
    std::uint8_t* data() const { return data_.data(); }  // the blocks of the same rows, one after the other
    std::vector<std::int32_t>& sums() { return sums_; }  // sum of each row's integers
    const std::vector<std::int32_t>& sums() const { return sums_; }
    std::int64_t rows() const { return rows_; }
    std::int64_t depth() const { return depth_; }
    std::int64_t blocks() const { return (depth_ + kBlockDepth - 1) / kBlockDepth; }  // blocks along the depth
    std::int64_t bytes() const;

private:
    std::int64_t rows_, depth_;
    AlignedMemory<std::uint8_t> data_;
    std::vector<std::int32_t> sums_;
};

struct IntegersJob {
    const std::uint8_t* bytes;
    const std::int32_t* sums;
    std::int64_t rows, blocks;
    const std::uint8_t* input;  // K + input_zero, at most 15: tokens x blocks * kBlockDepth
    std::int32_t input_zero;
    std::int64_t tokens;
    const float* steps;  // one for each row
    const float* bias;   // one for each row, or null
    float* output;       // tokens x rows
};

// Packs rows x depth, depth a multiple of four. Null if some four keep more than two, or an integer is outside [-7, 7].
std::unique_ptr<PackedIntegers> pack_integers(const std::int8_t* integers, std::int64_t rows, std::int64_t depth,
                                              unsigned threads);

// Writes x / step - low, for values that are whole steps from low to high, to rows of `stride` codes, and zeros behind
// them. Returns false if a value, such as a NaN, is anything else.
bool code_integers(const float* x, std::int64_t tokens, std::int64_t depth, float step, int low, int high,
                   std::uint8_t* codes, std::int64_t stride);

void multiply_integers(const IntegersJob& job, InstructionSet isa, unsigned threads);

}  // namespace nmcompile
