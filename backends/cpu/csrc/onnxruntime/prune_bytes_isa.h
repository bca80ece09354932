// 4:8 pruning of bytes as compiled for each instruction set (see prune_bytes_isa.cpp).
#pragma once

#include "onnxruntime/prune_bytes.h"

namespace nmcompile {

namespace baseline {
void prune_bytes(const BytesJob& job, std::int64_t first, std::int64_t last);
}
#if defined(__x86_64__)
namespace v3 {
void prune_bytes(const BytesJob& job, std::int64_t first, std::int64_t last);
}
namespace v4 {
void prune_bytes(const BytesJob& job, std::int64_t first, std::int64_t last);
}
#endif

}  // namespace nmcompile
