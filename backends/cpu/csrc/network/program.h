// A network in integers: steps on images in one arena, run one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "machine/aligned_memory.h"
#include "network/network_isa.h"

namespace nmcompile {


struct Run {
    std::uint8_t* arena;
    const std::vector<float*>& slots;
    const Kernels& kernels;
    unsigned threads;
};

class Step {
public:
    virtual ~Step() = default;
    // Returns false if an input has a NaN, or is not on its grid although it has to be.
    virtual bool run(const Run& run) const = 0;
};

class Program {
public:
    explicit Program(std::int64_t bytes) : arena_(bytes + kSlack), bytes_(bytes) {}
    void add(std::unique_ptr<Step> step) { steps_.push_back(std::move(step)); }
    std::int64_t bytes() const { return bytes_; }
    std::int64_t size() const { return static_cast<std::int64_t>(steps_.size()); }
    // Returns how many slots the steps read and write.
    std::size_t slots() const { return slots_; }
    void use_slot(std::size_t slot) { slots_ = std::max(slots_, slot + 1); }

    // Runs steps [first, last); returns the number of the first one whose input has a NaN, -1 if there is none.
    std::int64_t run(std::int64_t first, std::int64_t last, const std::vector<float*>& slots, InstructionSet isa,
                     unsigned threads);

private:
    AlignedMemory<std::uint8_t> arena_;
    std::int64_t bytes_;
    std::size_t slots_ = 0;
    std::vector<std::unique_ptr<Step>> steps_;
    std::mutex running_;  // the arena holds one run
};

}  // namespace nmcompile
