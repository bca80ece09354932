// A linear layer whose operands, its input excepted, do not change: one call rounds the input to its grid and multiplies.
#pragma once

#include <cstdint>
#include <vector>

#include "integers/packed_integers.h"

namespace nmcompile {

struct InputGrid {
    float step;
    int low, high;  // the integers that it has; at most 15 lie between them
};

struct FrozenLinear {
    const PackedIntegers& packed;
    InputGrid grid;
    std::vector<float> steps;  // one for each row: the step of the weight times that of the input
    std::vector<float> bias;   // one for each row, or empty

    // Writes tokens x rows for tokens x depth. Returns false, with `output` undefined, if an input is a NaN.
    bool run(const float* input, std::int64_t tokens, float* output, InstructionSet isa, unsigned threads) const;
};

// Writes x / step, rounded to even and clamped to the grid, less its lowest integer, to rows of `stride` codes, and
// zeros behind them. Returns false if a value is a NaN.
bool round_to_codes(const float* x, std::int64_t tokens, std::int64_t depth, const InputGrid& grid, std::uint8_t* codes,
                    std::int64_t stride);

}  // namespace nmcompile
