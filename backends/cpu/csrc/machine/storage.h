// The memory formats of elements, and the type of arithmetic on them: float, or double for double.
#pragma once

#include <bit>
#include <cstdint>

namespace nmcompile {

struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

template <class T>
struct Arithmetic {
    using Real = T;
};
template <>
struct Arithmetic<Half> {
    using Real = float;
};
template <>
struct Arithmetic<BFloat16> {
    using Real = float;
};

// Selects `yes` or `no` without a branch: the outcome looks random to the processor.
inline std::uint32_t select(bool condition, std::uint32_t yes, std::uint32_t no) {
    const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
    return (yes & mask) | (no & ~mask);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
    // The product moves the exponent's bias from 15 to 127 and makes subnormal numbers normal.
    const std::uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    const std::uint32_t finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const std::uint32_t special = magnitude | 0x7F800000u;
    return std::bit_cast<float>(sign | select(magnitude >= (0x7C00u << 13), special, finite));
}

// Rounds to the nearest value of the type, ties to even; overflow is infinite. `x` is not a NaN.
template <class T>
T narrow(typename Arithmetic<T>::Real x);

template <>
inline float narrow<float>(float x) {
    return x;
}
template <>
inline double narrow<double>(double x) {
    return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return {static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Half narrow<Half>(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t rebiased = magnitude - (112u << 23);
    const std::uint32_t normal = (rebiased + 0xFFFu + ((rebiased >> 13) & 1)) >> 13;
    // Adding 1/2 aligns a subnormal result with the lowest bits of the sum, which rounds it.
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
    const std::uint32_t finite = select(magnitude < (113u << 23), subnormal, normal);
    const std::uint32_t result = select(magnitude < (143u << 23), finite, 0x7C00u);
    return {static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | result)};
}

}  // namespace nmcompile
