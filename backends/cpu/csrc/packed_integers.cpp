// Packs integers, and spreads the rows of a product over threads.

#include "packed_integers.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "packed_integers_isa.h"
#include "parallel.h"

namespace nmcompile {
namespace {

constexpr std::align_val_t kLine{64};
constexpr std::int64_t kBlocksOfATask = 8;  // of rows: one task reads tens of kilobytes, once for all tokens

std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

auto kernel_of(InstructionSet isa) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return v4::multiply_integers;
    if (isa == InstructionSet::v3) return v3::multiply_integers;
#endif
    return baseline::multiply_integers;
}

// One row of a block of zeros; `row` is its number in the block. False where it cannot be packed.
bool pack_row(const std::int8_t* integers, int count, int row, std::uint32_t* block) {
    const int pair = row / 2;
    std::uint32_t *const places = block, *const values = block + (1 + pair) * kStepLanes;
    for (int four = 0; four < count / 4; ++four) {
        const int step = four / 4;
        int lane = four % 4 * 4 + row % 2 * 2, kept = 0;
        for (std::uint32_t place = 0; place < 4; ++place) {
            const int value = integers[4 * four + static_cast<int>(place)];
            if (value == 0) continue;
            if (value < -8 || value > 7 || ++kept > 2) return false;
            places[lane] |= place << (2 * (8 * pair + step));
            values[lane] |= (static_cast<std::uint32_t>(value) & 15u) << (4 * step);
            ++lane;
        }
    }
    return true;
}

}  // namespace

void PackedIntegers::Free::operator()(std::uint32_t* words) const { ::operator delete(words, kLine); }

PackedIntegers::PackedIntegers(std::int64_t rows, std::int64_t depth)
    : rows_(rows), depth_(depth), words_(static_cast<std::uint32_t*>(::operator new(bytes(), kLine))) {}

std::int64_t PackedIntegers::bytes() const {
    return pieces(rows_, kBlockRows) * blocks() * kBlockWords * static_cast<std::int64_t>(sizeof(std::uint32_t));
}

std::unique_ptr<PackedIntegers> pack_integers(const std::int8_t* integers, std::int64_t rows, std::int64_t depth,
                                              unsigned threads) {
    auto packed = std::make_unique<PackedIntegers>(rows, depth);
    const std::int64_t blocks = packed->blocks();
    std::atomic<bool> fits = true;
    in_parallel(pieces(rows, kBlockRows) * blocks, blocks, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            std::uint32_t* const block = packed->words() + i * kBlockWords;
            std::fill_n(block, kBlockWords, 0u);
            const std::int64_t row = i / blocks * kBlockRows, from = i % blocks * kBlockDepth;
            const int count = static_cast<int>(std::min<std::int64_t>(kBlockDepth, depth - from));
            for (std::int64_t r = row; r < std::min(rows, row + kBlockRows); ++r) {
                if (!pack_row(integers + r * depth + from, count, static_cast<int>(r - row), block)) fits = false;
            }
        }
    });
    return fits ? std::move(packed) : nullptr;
}

void multiply_integers(const IntegersJob& job, InstructionSet isa, unsigned threads) {
    const auto multiply = kernel_of(isa);
    in_parallel(pieces(job.rows, kBlockRows), kBlocksOfATask, threads,
                [&](std::int64_t first, std::int64_t last) { multiply(job, first, last); });
}

}  // namespace nmcompile
