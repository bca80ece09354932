// Memory for machine code that this program writes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nmcompile {

class ExecutableMemory {
public:
    explicit ExecutableMemory(std::size_t bytes);
    ~ExecutableMemory();
    ExecutableMemory(const ExecutableMemory&) = delete;
    ExecutableMemory& operator=(const ExecutableMemory&) = delete;

    // Null if the system forbids pages that are both writable and executable.
    std::uint8_t* data() const { return data_; }

private:
    std::uint8_t* data_;
    std::size_t bytes_;
};

}  // namespace nmcompile
