// 4:8 pruning of bytes as compiled for each instruction set (see prune_bytes_isa.cpp).
#pragma once

#include <cstdint>

#include "onnxruntime/prune_bytes.h"

namespace nmcompile {

namespace baseline {
void prune_bytes(const std::uint8_t* x, std::uint8_t* pruned, std::int64_t blocks, bool wide);
}
#if defined(__x86_64__)
namespace v3 {
void prune_bytes(const std::uint8_t* x, std::uint8_t* pruned, std::int64_t blocks, bool wide);
}
namespace v4 {
void prune_bytes(const std::uint8_t* x, std::uint8_t* pruned, std::int64_t blocks, bool wide);
}
#endif

}  // namespace nmcompile
