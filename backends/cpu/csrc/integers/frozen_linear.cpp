#include "integers/frozen_linear.h"

#include <algorithm>
#include <memory>

namespace nmcompile {
namespace {

constexpr float kRound = 3 << 22;  // a sum with it has no place for a fraction, and is rounded to even

}  // namespace

bool round_to_codes(const float* x, std::int64_t tokens, std::int64_t depth, const InputGrid& grid, std::uint8_t* codes,
                    std::int64_t stride) {
    const float least = static_cast<float>(grid.low), most = static_cast<float>(grid.high), step = grid.step;
    int nans = 0;
    for (std::int64_t t = 0; t < tokens; ++t, x += depth, codes += stride) {
        for (std::int64_t i = 0; i < depth; ++i) {
            float steps = x[i] / step + kRound - kRound;
            nans += steps != steps;
            steps = steps >= least ? steps : least;
            steps = steps <= most ? steps : most;
            codes[i] = static_cast<std::uint8_t>(static_cast<int>(steps) - grid.low);
        }
        std::fill(codes + depth, codes + stride, std::uint8_t{0});
    }
    return nans == 0;
}

bool FrozenLinear::run(const float* input, std::int64_t tokens, float* output, InstructionSet isa,
                       unsigned threads) const {
    const std::int64_t stride = packed.blocks() * kBlockDepth;
    const auto codes = std::make_unique_for_overwrite<std::uint8_t[]>(tokens * stride);
    if (!round_to_codes(input, tokens, packed.depth(), grid, codes.get(), stride)) return false;
    const IntegersJob job{packed.data(), packed.sums().data(), packed.rows(), packed.blocks(), codes.get(), -grid.low,
                          tokens, steps.data(), bias.empty() ? nullptr : bias.data(), output};
    multiply_integers(job, isa, threads);
    return true;
}

}  // namespace nmcompile
