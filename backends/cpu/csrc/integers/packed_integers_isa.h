// The product of packed integers as compiled for each instruction set (see packed_integers_isa.cpp).
#pragma once

#include "integers/packed_integers.h"

namespace nmcompile {

// Computes all tokens for the rows from `first`, where a block begins, up to `last`.
namespace baseline {
void multiply_integers(const IntegersJob& job, std::int64_t first, std::int64_t last);
}
#if defined(__x86_64__)
namespace v3 {
void multiply_integers(const IntegersJob& job, std::int64_t first, std::int64_t last);
}
namespace v4 {
void multiply_integers(const IntegersJob& job, std::int64_t first, std::int64_t last);
}
#endif

}  // namespace nmcompile
