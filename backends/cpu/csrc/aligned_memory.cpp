#include "aligned_memory.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nmcompile {
namespace {

constexpr std::size_t kLine = 64, kLargePage = std::size_t{1} << 21;

std::align_val_t alignment(std::size_t bytes) { return std::align_val_t(bytes < 2 * kLargePage ? kLine : kLargePage); }

}  // namespace

void* allocate(std::size_t bytes) {
    void* const data = ::operator new(bytes, alignment(bytes));
#if defined(__linux__)
    // A page fault for each 2 MB, and fewer addresses to translate. Where the system has no such pages, nothing changes.
    if (bytes >= 2 * kLargePage) madvise(data, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
    return data;
}

void release(void* data, std::size_t bytes) { ::operator delete(data, alignment(bytes)); }

}  // namespace nmcompile
