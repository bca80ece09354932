#include "spare_memory.h"

#include "aligned_memory.h"

#include <mutex>
#include <utility>

namespace nmcompile {
namespace {

struct Spare {
    std::mutex mutex;
    void* data = nullptr;
    std::size_t bytes = 0;
};

// Never destroyed: a tensor may outlive whatever else is static.
Spare& spare() {
    static Spare& only = *new Spare;
    return only;
}

}  // namespace

Memory::Memory(std::size_t bytes) : data_(nullptr), bytes_(bytes) {
    {
        const std::lock_guard lock(spare().mutex);
        if (spare().bytes >= bytes && spare().bytes / 2 <= bytes) {
            data_ = std::exchange(spare().data, nullptr);
            bytes_ = std::exchange(spare().bytes, 0);
        }
    }
    if (data_ == nullptr) data_ = allocate(bytes_);
}

Memory::~Memory() {
    {
        const std::lock_guard lock(spare().mutex);
        std::swap(spare().data, data_);
        std::swap(spare().bytes, bytes_);
    }
    if (data_ != nullptr) release(data_, bytes_);
}

}  // namespace nmcompile
