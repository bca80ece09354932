// Memory of large results that later results reuse. The system would fill it with zeros for every result, with page
// faults: in a step of a small transformer they took longer than the pruning.
#pragma once

#include <cstddef>

namespace nmcompile {

// How much larger than asked for a reused block may be: a result holds it for long, a call only until it returns.
enum class Excess { little, any };

// Some memory, aligned to cache lines. When it is destroyed it is saved for others, as long as the total is at most what
// was in use at one time.
class Memory {
   public:
    explicit Memory(std::size_t bytes, Excess excess = Excess::little);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return data_; }

   private:
    void* data_;
    std::size_t bytes_, resident_;
};

}  // namespace nmcompile
