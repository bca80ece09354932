// Memory of large results that later results reuse. The system would fill it with zeros for every result, with page
// faults: in a step of a small transformer they took longer than the pruning.
#pragma once

#include <cstddef>

namespace nmcompile {

// Some memory, aligned to cache lines. When it is destroyed it is saved for others of about its size, as long as the
// total is at most what was in use at one time.
class Memory {
   public:
    explicit Memory(std::size_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return data_; }

   private:
    void* data_;
    std::size_t bytes_;
};

}  // namespace nmcompile
