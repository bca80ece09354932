// Codes by one multiplication and one addition. A layer's codes are
//
//     clamp(round(y / step), low, high) - low = clamp(round(n * scale + offset), 0, high - low)
//
// unless the two numbers before rounding lie on both sides of the middle between two integers. They differ by less than
// a margin, since float32 rounds in each operation; so a fraction that is farther than that from 1/2 decides.
#pragma once

#include <cstdint>
#include <vector>

#include "network/integer_layer.h"

namespace nmcompile {

// Factors of each out-channel: y = ((n - zero * sums) * steps + bias) * gain + shift. Without a bias, or without a norm,
// these are null.
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
    std::vector<float> scale, offset;  // of each out-channel, and zeros for kernels that read whole vectors
    float limit = 0;                   // a fraction in [-1/2, 1/2] decides if its magnitude is less
};

// Returns the scaling of a layer; its limit is 0 if factors or sums are too large for it.
Scaling scaling_of(const IntegerLayer& layer, const Affine& affine, const Grid& grid);

}  // namespace nmcompile
