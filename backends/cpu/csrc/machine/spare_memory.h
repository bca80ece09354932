// Memory that large results leave to later ones. The system would fill it with zeros anew for every result, and take page
// faults for that: in a step of a small transformer they took longer than the pruning.
#pragma once

#include <cstddef>

namespace nmcompile {

// Some memory, aligned to cache lines. When it is destroyed it is spared for others of about its size, as long as all
// together is not more than was in use at one time.
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
