// Philox4x32-10, the counter-based random numbers of nmcompile/pruning/philox.py.
#pragma once

#include <array>
#include <cstdint>

namespace nmcompile {

using Words = std::array<std::uint32_t, 4>;

inline Words philox4x32(std::uint64_t counter, std::uint64_t key) {
    constexpr std::uint64_t kMultipliers[] = {0xD2511F53, 0xCD9E8D57};
    constexpr std::uint32_t kWeyl[] = {0x9E3779B9, 0xBB67AE85};
    Words c = {static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0};
    auto k0 = static_cast<std::uint32_t>(key);
    auto k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = kMultipliers[0] * c[0];
        const std::uint64_t p1 = kMultipliers[1] * c[2];
        c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
             static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
        k0 += kWeyl[0];
        k1 += kWeyl[1];
    }
    return c;
}

// Uniform numbers `first`, `first + stride`, ... of a key, each in [0, 1) with 24 bits. Numbers that share a counter
// share its four words.
template <class Real>
void uniforms(std::uint64_t key, std::uint64_t first, std::uint64_t stride, int count, Real* u) {
    std::uint64_t number = first;
    for (int filled = 0; filled < count;) {
        const std::uint64_t counter = number >> 2;
        const Words words = philox4x32(counter, key);
        do {
            u[filled++] = static_cast<Real>(words[number & 3] >> 8) * static_cast<Real>(0x1p-24);
            number += stride;
        } while (filled < count && number >> 2 == counter);
    }
}

}  // namespace nmcompile
