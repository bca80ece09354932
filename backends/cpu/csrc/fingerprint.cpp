#include "fingerprint.h"

#include <array>
#include <atomic>
#include <cstring>

#include "machine/parallel.h"

namespace nmcompile {
namespace {

using Word = std::uint64_t;

constexpr std::int64_t kWords = 1024;  // 4-byte words in a row
constexpr std::int64_t kRowBytes = 4 * kWords;
constexpr std::int64_t kRowsOfATask = 16;

constexpr Word mixed(Word x) {
    x *= 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

// No two keys are equal, so two different words cannot swap places unseen.
constexpr std::array<std::uint32_t, kWords> kKeys = [] {
    std::array<std::uint32_t, kWords> keys{};
    for (std::int64_t j = 0; j < kWords; ++j) keys[j] = static_cast<std::uint32_t>(mixed(j + 1) >> 33);
    return keys;
}();

Word row_sum(const std::uint8_t* bytes) {
    Word sum = 0;
    for (std::int64_t j = 0; j < kWords; ++j) {
        std::uint32_t word;
        std::memcpy(&word, bytes + 4 * j, 4);
        sum += static_cast<Word>(kKeys[j]) * word;
    }
    return sum;
}

Word last_row_sum(const std::uint8_t* bytes, std::int64_t size) {
    std::array<std::uint8_t, kRowBytes> row{};
    std::memcpy(row.data(), bytes, size);
    return row_sum(row.data());
}

}  // namespace

std::int64_t fingerprint(const std::uint8_t* bytes, std::int64_t size, unsigned threads) {
    const std::int64_t rows = pieces(size, kRowBytes);
    std::atomic<Word> total = mixed(size);
    in_parallel(rows, kRowsOfATask, rows <= kRowsOfATask ? 1 : threads, [&](std::int64_t first, std::int64_t last) {
        Word part = 0;
        for (std::int64_t row = first; row < last; ++row) {
            const std::uint8_t* const start = bytes + row * kRowBytes;
            const std::int64_t left = size - row * kRowBytes;
            part += mixed((left < kRowBytes ? last_row_sum(start, left) : row_sum(start)) + mixed(row + 1));
        }
        total.fetch_add(part, std::memory_order_relaxed);
    });
    return static_cast<std::int64_t>(total.load());
}

}  // namespace nmcompile
