#include "machine/executable_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nmcompile {

#if defined(__linux__)
// One mapping for both: a processor sees without further ado what its own thread writes there, and a forked process has
// its own pages.
ExecutableMemory::ExecutableMemory(std::size_t bytes) : data_(nullptr), bytes_(bytes) {
    void* const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages != MAP_FAILED) data_ = static_cast<std::uint8_t*>(pages);
}

ExecutableMemory::~ExecutableMemory() {
    if (data_ != nullptr) munmap(data_, bytes_);
}
#else
ExecutableMemory::ExecutableMemory(std::size_t bytes) : data_(nullptr), bytes_(bytes) {}

ExecutableMemory::~ExecutableMemory() = default;
#endif

}  // namespace nmcompile
