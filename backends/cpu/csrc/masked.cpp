#include "masked.h"

#include <stdexcept>

#include "machine/parallel.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kElementsOfATask = 1 << 15;

// With bits and not with a branch, since a processor cannot predict a mask.
template <class Word>
void write_words(const void* x, const std::uint8_t* mask, void* out, std::int64_t count, unsigned threads) {
    const Word* const from = static_cast<const Word*>(x);
    Word* const to = static_cast<Word*>(out);
    const unsigned useful = count <= 4 * kElementsOfATask ? 1 : threads;
    in_parallel(count, kElementsOfATask, useful, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) to[i] = from[i] & static_cast<Word>(-static_cast<Word>(mask[i]));
    });
}

}  // namespace

void write_masked(const void* x, const std::uint8_t* mask, void* out, std::int64_t count, int size, unsigned threads) {
    switch (size) {
        case 2: return write_words<std::uint16_t>(x, mask, out, count, threads);
        case 4: return write_words<std::uint32_t>(x, mask, out, count, threads);
        case 8: return write_words<std::uint64_t>(x, mask, out, count, threads);
        default: throw std::invalid_argument("elements have 2, 4 or 8 bytes");
    }
}

}  // namespace nmcompile
