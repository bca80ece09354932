// A number that identifies the content of memory (defined in nmcompile/fingerprint.py).
#pragma once

#include <cstdint>

namespace nmcompile {

std::int64_t fingerprint(const std::uint8_t* bytes, std::int64_t size, unsigned threads);

}  // namespace nmcompile
