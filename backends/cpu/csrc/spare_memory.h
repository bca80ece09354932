// Memory that large results leave to the next one. The C library would give it back to the system, which takes a page
// fault for every 4 KB of the next result: a step of a ResNet spent nearly as long on them as on pruning its gradients.
#pragma once

#include <cstddef>

namespace nmcompile {

// Some memory, aligned to cache lines. When it is destroyed it becomes the spare one, in place of the one before.
class Memory {
   public:
    explicit Memory(std::size_t bytes);  // the spare one, where it is large enough and not too large
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return data_; }

   private:
    void* data_;
    std::size_t bytes_;
};

}  // namespace nmcompile
