#include "spare_memory.h"

#include <algorithm>
#include <list>
#include <mutex>

#include "aligned_memory.h"

namespace nmcompile {
namespace {

struct Block {
    void* data;
    std::size_t bytes;
};

class Spare {
   public:
    // The smallest block that is large enough and not much larger; without data where there is none.
    Block take(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        const auto fits = [&](const Block& block) { return block.bytes >= bytes && block.bytes - bytes <= bytes / 8; };
        auto best = blocks_.end();
        for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
            if (fits(*block) && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
        }
        Block taken{nullptr, bytes};
        if (best != blocks_.end()) {
            taken = *best;
            idle_ -= taken.bytes;
            blocks_.erase(best);
        }
        used_ += taken.bytes;
        most_ = std::max(most_, used_);
        trim();
        return taken;
    }

    void put(const Block& block) {
        const std::lock_guard lock(mutex_);
        used_ -= block.bytes;
        idle_ += block.bytes;
        blocks_.push_back(block);
        trim();
    }

   private:
    // Gives back what has waited longest.
    void trim() {
        while (idle_ + used_ > most_) {
            idle_ -= blocks_.front().bytes;
            release(blocks_.front().data, blocks_.front().bytes);
            blocks_.pop_front();
        }
    }

    std::mutex mutex_;
    std::list<Block> blocks_;
    std::size_t idle_ = 0, used_ = 0, most_ = 0;
};

// Never destroyed: a tensor may outlive whatever else is static.
Spare& spare() {
    static Spare& only = *new Spare;
    return only;
}

}  // namespace

Memory::Memory(std::size_t bytes) {
    const Block block = spare().take(bytes);
    data_ = block.data != nullptr ? block.data : allocate(block.bytes);
    bytes_ = block.bytes;
}

Memory::~Memory() { spare().put({data_, bytes_}); }

}  // namespace nmcompile
