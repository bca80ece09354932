#include "machine/aligned_memory.h"

#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nmcompile {

constexpr std::align_val_t kLine{64};

#if defined(__linux__)
namespace {

constexpr std::size_t kLargePage = std::size_t{1} << 21;

std::size_t whole_pages(std::size_t bytes) {
    static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}

}  // namespace

// Large blocks come from the system and go back to it, with a page fault for each 2 MB instead of each 4 KB if the
// system has such pages.
void* allocate(std::size_t bytes) {
    if (bytes < kLargePage) return ::operator new(bytes, kLine);
    const std::size_t size = whole_pages(bytes);
    void* const mapped = mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    auto* const first = static_cast<std::uint8_t*>(mapped);
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(mapped) % kLargePage;
    if (before > 0) munmap(first, before);
    munmap(first + before + size, kLargePage - before);
    madvise(first + before, size, MADV_HUGEPAGE);
    return first + before;
}

void release(void* data, std::size_t bytes) {
    if (bytes < kLargePage) return ::operator delete(data, kLine);
    munmap(data, whole_pages(bytes));
}

std::size_t shrink(void* data, std::size_t bytes, std::size_t resident, std::size_t excess) {
    if (bytes < kLargePage) return 0;  // its first and last page hold other blocks too
    const std::size_t left = resident > excess ? (resident - excess) / kLargePage * kLargePage : 0;
    return madvise(static_cast<std::uint8_t*>(data) + left, resident - left, MADV_DONTNEED) == 0 ? left : 0;
}
#else
void* allocate(std::size_t bytes) { return ::operator new(bytes, kLine); }
void release(void* data, std::size_t) { ::operator delete(data, kLine); }
std::size_t shrink(void*, std::size_t, std::size_t, std::size_t) { return 0; }
#endif

}  // namespace nmcompile
