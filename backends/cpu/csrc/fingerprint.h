// A number that tells one content of memory from another (see nmcompile/fingerprint.py, which defines it).
#pragma once

#include <cstdint>

namespace nmcompile {

std::int64_t fingerprint(const std::uint8_t* bytes, std::int64_t size, unsigned threads);

}  // namespace nmcompile
