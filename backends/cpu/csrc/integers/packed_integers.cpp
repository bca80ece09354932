// Packs integers, and spreads the rows of a product over threads.

#include "integers/packed_integers.h"

#include <algorithm>
#include <atomic>

#include "integers/packed_integers_isa.h"
#include "machine/parallel.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kRowsOfATask = 32;    // tens of kilobytes, which a cache holds for all tokens
constexpr std::int64_t kRowsOfAStream = 1024;

auto kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::multiply_integers;
    if (isa == InstructionSet::v3) return v3::multiply_integers;
#endif
    return baseline::multiply_integers;
}

// Packs one row into a block of zeros; `row` is its number in the block. Returns false if it cannot be packed.
bool pack_row(const std::int8_t* integers, int count, int row, std::uint8_t* block, std::int32_t& sum) {
    const int pair = row / 2;
    std::uint8_t *const places = block, *const values = block + (1 + pair) * kLaneBytes;
    for (int four = 0; four < count / 4; ++four) {
        const int half = four / (kBlockDepth / 8);
        int lane = four % (kBlockDepth / 8) / 4 * 16 + row % 2 * 8 + four % 4 * 2, kept = 0;
        for (int place = 0; place < 4; ++place) {
            const int value = integers[4 * four + place];
            if (value == 0) continue;
            if (value < -7 || value > 7 || ++kept > 2) return false;
            places[lane] |= place << 2 * (2 * pair + half);
            values[lane] |= (value & 15) << 4 * half;
            sum += value;
            ++lane;
        }
    }
    return true;
}

// Returns whether all blocks of the rows from `row` on can be packed.
bool pack_rows(const std::int8_t* integers, std::int64_t depth, std::int64_t row, PackedIntegers& packed) {
    std::uint8_t* block = packed.data() + row / kBlockRows * packed.blocks() * kBlockBytes;
    std::fill_n(block, packed.blocks() * kBlockBytes, std::uint8_t{0});
    for (std::int64_t from = 0; from < depth; from += kBlockDepth, block += kBlockBytes) {
        const int count = static_cast<int>(std::min<std::int64_t>(kBlockDepth, depth - from));
        for (std::int64_t r = row; r < std::min(packed.rows(), row + kBlockRows); ++r) {
            const std::int8_t* const part = integers + r * depth + from;
            if (!pack_row(part, count, static_cast<int>(r - row), block, packed.sums()[r])) return false;
        }
    }
    return true;
}

}  // namespace

PackedIntegers::PackedIntegers(std::int64_t rows, std::int64_t depth)
    : rows_(rows), depth_(depth), data_(bytes()), sums_(rows) {}

std::int64_t PackedIntegers::bytes() const { return pieces(rows_, kBlockRows) * blocks() * kBlockBytes; }

std::unique_ptr<PackedIntegers> pack_integers(const std::int8_t* integers, std::int64_t rows, std::int64_t depth,
                                              unsigned threads) {
    if (depth > kMostDepth) return nullptr;
    auto packed = std::make_unique<PackedIntegers>(rows, depth);
    std::atomic<bool> fits = true;
    in_parallel(pieces(rows, kBlockRows), 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            if (!pack_rows(integers, depth, i * kBlockRows, *packed)) fits = false;
        }
    });
    return fits ? std::move(packed) : nullptr;
}

bool code_integers(const float* x, std::int64_t tokens, std::int64_t depth, float step, int low, int high,
                   std::uint8_t* codes, std::int64_t stride) {
    constexpr float kRound = 3 << 22;  // a sum with it has no place for a fraction, and is rounded to even
    const float least = static_cast<float>(low), most = static_cast<float>(high);
    bool fits = true;
    for (std::int64_t t = 0; t < tokens; ++t, x += depth, codes += stride) {
        int strangers = 0;
        for (std::int64_t i = 0; i < depth; ++i) {
            float steps = x[i] / step + kRound - kRound;
            steps = steps >= least ? steps : least;  // a NaN too
            steps = steps <= most ? steps : most;
            strangers += steps * step != x[i];
            codes[i] = static_cast<std::uint8_t>(static_cast<int>(steps) - low);
        }
        std::fill(codes + depth, codes + stride, std::uint8_t{0});
        fits = fits && strangers == 0;
    }
    return fits;
}

void multiply_integers(const IntegersJob& job, InstructionSet isa, unsigned threads) {
    const auto multiply = kernel_of(isa);
    // One token reads each row once: a stream for each thread, which is short enough to be taken over from a thread that
    // has to share its core.
    const std::int64_t share = pieces(pieces(job.rows, threads), kBlockRows) * kBlockRows;
    in_parallel(job.rows, job.tokens == 1 ? std::min(share, kRowsOfAStream) : kRowsOfATask, threads,
                [&](std::int64_t first, std::int64_t last) { multiply(job, first, last); });
}

}  // namespace nmcompile
