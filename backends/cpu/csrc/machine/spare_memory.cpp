#include "machine/spare_memory.h"

#include <algorithm>
#include <list>
#include <mutex>

#include "machine/aligned_memory.h"

namespace nmcompile {
namespace {

struct Block {
    void* data;
    std::size_t bytes;
};

class Spare {
   public:
    // Takes the smallest idle block that is large enough and not much larger, of several the last used; else a new one.
    Block take(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        auto best = idle_blocks_.end();
        for (auto block = idle_blocks_.begin(); block != idle_blocks_.end(); ++block) {
            const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 8;
            if (fits && (best == idle_blocks_.end() || block->bytes <= best->bytes)) best = block;
        }
        if (best == idle_blocks_.end()) return fresh(bytes);
        const Block taken = *best;
        idle_blocks_.erase(best);
        idle_ -= taken.bytes;
        used_ += taken.bytes;
        return taken;
    }

    void put(const Block& block) {
        const std::lock_guard lock(mutex_);
        idle_blocks_.push_back(block);
        used_ -= block.bytes;
        idle_ += block.bytes;
    }

   private:
    // Frees the block that has waited longest first, so the process never has more memory than it once used.
    Block fresh(std::size_t bytes) {
        most_ = std::max(most_, used_ + bytes);
        while (used_ + bytes + idle_ > most_) {
            const Block& oldest = idle_blocks_.front();
            release(oldest.data, oldest.bytes);
            idle_ -= oldest.bytes;
            idle_blocks_.pop_front();
        }
        const Block block{allocate(bytes), bytes};
        used_ += bytes;
        return block;
    }

    std::mutex mutex_;
    std::list<Block> idle_blocks_;
    std::size_t idle_ = 0, used_ = 0, most_ = 0;
};

// Never destroyed: a tensor may outlive all other static objects.
Spare& spare() {
    static Spare& only = *new Spare;
    return only;
}

}  // namespace

Memory::Memory(std::size_t bytes) {
    const Block block = spare().take(bytes);
    data_ = block.data;
    bytes_ = block.bytes;
}

Memory::~Memory() { spare().put({data_, bytes_}); }

}  // namespace nmcompile
