// Memory aligned to cache lines, or to large pages if it is large enough to fill some.
#pragma once

#include <cstddef>
#include <memory>

namespace nmcompile {

void* allocate(std::size_t bytes);
void release(void* data, std::size_t bytes);

// Returns at least `excess` of the first `resident` bytes of a block to the system, and how many are left. Those returned
// have lost their values; the block keeps its size. If none are left, the block is still to be released.
std::size_t shrink(void* data, std::size_t bytes, std::size_t resident, std::size_t excess);

// Memory for `count` elements, which are not initialized.
template <class Element>
class AlignedMemory {
public:
    explicit AlignedMemory(std::size_t count) : data_(static_cast<Element*>(allocate(count * sizeof(Element))), {count}) {}
    Element* data() const { return data_.get(); }
    std::size_t count() const { return data_.get_deleter().count; }

private:
    struct Release {
        std::size_t count = 0;
        void operator()(Element* data) const { release(data, count * sizeof(Element)); }
    };
    std::unique_ptr<Element, Release> data_;
};

}  // namespace nmcompile
