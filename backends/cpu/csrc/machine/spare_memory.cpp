#include "machine/spare_memory.h"

#include <algorithm>
#include <cstdint>
#include <list>
#include <mutex>

#include "machine/aligned_memory.h"

namespace nmcompile {
namespace {

struct Block {
    void* data;
    std::size_t bytes;
    std::size_t resident;  // bytes, from its start
};

constexpr std::size_t kFew = std::size_t{12} << 20;  // bytes

class Spare {
   public:
    // Takes the smallest idle block that is large enough and not too large, of several the last used; else a new one.
    Block take(std::size_t bytes, Excess excess) {
        const std::lock_guard lock(mutex_);
        const std::size_t largest = excess == Excess::any ? SIZE_MAX : bytes + bytes / 8;
        auto best = idle_blocks_.end();
        for (auto block = idle_blocks_.begin(); block != idle_blocks_.end(); ++block) {
            const bool fits = block->bytes >= bytes && block->bytes <= largest;
            if (fits && (best == idle_blocks_.end() || block->bytes <= best->bytes)) best = block;
        }
        if (best == idle_blocks_.end()) {
            make_room(bytes);
            return {allocate(bytes), bytes, bytes};
        }
        Block taken = *best;
        idle_blocks_.erase(best);
        idle_ -= taken.resident;
        taken.resident = std::max(taken.resident, bytes);
        make_room(taken.resident);
        return taken;
    }

    void put(const Block& block) {
        const std::lock_guard lock(mutex_);
        idle_blocks_.push_back(block);
        used_ -= block.resident;
        idle_ += block.resident;
    }

   private:
    // Takes pages from the block that has waited longest first, so the process never has more memory than it once used.
    // The last sixteenth of that is in use for moments only, and memory of other allocators has its peak at others; but
    // a few blocks stay, which take turns in every layer.
    void make_room(std::size_t bytes) {
        used_ += bytes;
        most_ = std::max(most_, used_);
        const std::size_t kept = std::min(most_, std::max(used_ + kFew, most_ - most_ / 16));
        while (used_ + idle_ > kept) {
            Block& oldest = idle_blocks_.front();
            const std::size_t left = shrink(oldest.data, oldest.bytes, oldest.resident, used_ + idle_ - kept);
            idle_ -= oldest.resident - left;
            oldest.resident = left;
            if (left > 0) continue;
            release(oldest.data, oldest.bytes);
            idle_blocks_.pop_front();
        }
    }

    std::mutex mutex_;
    std::list<Block> idle_blocks_;
    std::size_t idle_ = 0, used_ = 0, most_ = 0;  // idle: resident bytes
};

// Never destroyed: a tensor may outlive all other static objects.
Spare& spare() {
    static Spare& only = *new Spare;
    return only;
}

}  // namespace

Memory::Memory(std::size_t bytes, Excess excess) {
    const Block block = spare().take(bytes, excess);
    data_ = block.data;
    bytes_ = block.bytes;
    resident_ = block.resident;
}

Memory::~Memory() { spare().put({data_, bytes_, resident_}); }

}  // namespace nmcompile
