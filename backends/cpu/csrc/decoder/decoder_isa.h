// The arithmetic of a decoder between its linear layers, in fp32.
#pragma once

#include <cstdint>

namespace nmcompile {

// One head that reads keys and values, and the heads of queries that share it.
struct HeadJob {
    const float* queries;  // queries x width
    float* keys;           // width x length: positions lie side by side
    float* values;         // length x width
    float* scores;         // room for `length` numbers
    float* output;         // queries x width
    std::int64_t queries_count, width, length, positions;
    float scale;
};

// attend: softmax of the scaled products with the keys of the first `positions` positions, times their values.
// normalize: x / sqrt(mean(x * x) + epsilon) * gain.
// gate_values: gate / (1 + exp(-gate)) * up, into `gate`.
// turn: the pairs (i, i + width / 2), by an angle each, of which cosine and sine stand in both halves.
#define NMCOMPILE_DECODER_KERNELS                                                                        \
    void attend(const HeadJob& job);                                                                     \
    void normalize(const float* x, const float* gain, float epsilon, std::int64_t width, float* output); \
    void gate_values(float* gate, const float* up, std::int64_t count);                                  \
    void turn(float* x, const float* cosines, const float* sines, std::int64_t width);

namespace baseline {
NMCOMPILE_DECODER_KERNELS
}
#if defined(__x86_64__)
namespace v3 {
NMCOMPILE_DECODER_KERNELS
}
namespace v4 {
NMCOMPILE_DECODER_KERNELS
}
#endif
#undef NMCOMPILE_DECODER_KERNELS

}  // namespace nmcompile
