// Elements where a mask holds, else zero.
#pragma once

#include <cstdint>

namespace nmcompile {

// Elements of `size` bytes: 2, 4 or 8. The mask has a byte for each, 0 or 1.
void write_masked(const void* x, const std::uint8_t* mask, void* out, std::int64_t count, int size, unsigned threads);

}  // namespace nmcompile
