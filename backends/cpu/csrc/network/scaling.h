// Codes by one multiplication and one addition. A layer's codes are
//
//     clamp(round(y / step), low, high) - low = clamp(floor(y / step - low + 1/2), 0, high - low)
//
// and n * scale + offset is y / step - low + 1/2 but for the rounding of float32 operations, which is less than a margin.
// So floor() of both is the same unless the fraction of one is as near to 0 or 1. All is in units of 2^-16, and the offset
// includes the margin of the largest code: the upper half of a 32-bit integer is the code, and a lower half above twice
// that margin decides. Of the others, a smaller code has a smaller margin.
#pragma once

#include <cstdint>
#include <vector>

#include "network/integer_layer.h"

namespace nmcompile {

// Factors of each out-channel: y = (n * steps + bias) * gain + shift, where n is the sum of products without
// zero * sums. Without a bias, or without a norm, these are null.
struct Affine {
    const float *steps, *bias, *gain, *shift;
    const std::int32_t* sums;  // of its integers
    std::int32_t zero;         // the code of zero of the input
};

struct Grid {
    float step;
    std::int32_t low, high;
};

struct Scaling {
    std::vector<float> scale, offset;  // of each out-channel, and some that decide for kernels that read whole vectors
    std::int32_t margin = 0;           // of the largest code; 0 if there is no such scaling
    float least = 0, growth = 0;       // the margin of a multiple k of the step: least + growth * |k|
};

// Returns the scaling of a layer; there is none if factors or sums are too large for it.
Scaling scaling_of(const IntegerLayer& layer, const Affine& affine, const Grid& grid);

}  // namespace nmcompile
