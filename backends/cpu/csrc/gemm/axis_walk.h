// Steps along an axis that counts in mixed radix, and loads that stop at the edge of an image.
#pragma once

#include "gemm/gemm.h"
#include "machine/lanes.h"

namespace nmcompile::NMCOMPILE_ISA {

using Index = std::int64_t;
using Float = Lanes<float>;
using Floats = Float::Reals;
using FloatInts = Float::Ints;
constexpr int kFloats = Float::kCount;

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index pieces(Index count, Index size) { return (count + size - 1) / size; }
constexpr Index greater(Index a, Index b) { return a > b ? a : b; }

// Writes the points of `count` indices from `first` on; divides once, then counts.
inline void walk(const GemmAxis& axis, Index first, Index count, Point* points) {
    Index places[kMaxDigits];
    Point now = axis.start;
    for (int d = kMaxDigits - 1; d >= 0; --d) {
        const Digit& digit = axis.digits[d];
        places[d] = first % digit.size;
        first /= digit.size;
        now.offset += places[d] * digit.step.offset;
        now.y += static_cast<std::int32_t>(places[d]) * digit.step.y;
        now.x += static_cast<std::int32_t>(places[d]) * digit.step.x;
    }
    for (Index i = 0; i < count; ++i) {
        points[i] = now;
        for (int d = kMaxDigits - 1; d >= 0; --d) {
            const Digit& digit = axis.digits[d];
            now.offset += digit.step.offset;
            now.y += digit.step.y;
            now.x += digit.step.x;
            if (++places[d] < digit.size) break;
            places[d] = 0;
            const auto size = static_cast<std::int32_t>(digit.size);
            now.offset -= digit.size * digit.step.offset;
            now.y -= size * digit.step.y;
            now.x -= size * digit.step.x;
        }
    }
}

// Elements that are consecutive in memory; x grows along them by `slope` (0 or 1), y is constant.
struct Run {
    Point start;
    int first, length, slope;

    bool is_placed_like(const Run& other) const {
        return start.y == other.start.y && start.x == other.start.x && length == other.length && slope == other.slope;
    }
};

// Returns the run of `points` that begins at `first`, `stride` apart; it has at most a vector of them.
inline Run run_from(const Point* points, Index first, Index count, Index stride) {
    Run run{points[first], static_cast<int>(first), 1, 0};
    for (Index i = first + stride; i < count && run.length < kFloats; i += stride, ++run.length) {
        const Point& point = points[i];
        const int slope = point.x - points[i - stride].x;
        if (run.length == 1) run.slope = slope;
        const bool follows = point.offset == points[i - stride].offset + 1 && point.y == run.start.y;
        if (!follows || slope != run.slope || (slope != 0 && slope != 1)) break;
    }
    if (run.length == 1) run.slope = 0;
    return run;
}

// Elements of a vector to touch: [low, high).
struct Inside {
    int low, high;
};

// Returns the elements of a run that are inside the image once the run is moved to `at`.
template <class T>
Inside inside_image(const GemmJob<T>& job, const Run& run, const Point& at) {
    const std::int32_t y = run.start.y + at.y, x = run.start.x + at.x;
    if (y < 0 || y >= job.height) return {0, 0};
    if (run.slope == 0) return {0, x < 0 || x >= job.width ? 0 : run.length};
    const auto low = static_cast<int>(greater(0, -static_cast<Index>(x)));
    const auto high = static_cast<int>(smaller(run.length, static_cast<Index>(job.width) - x));
    return low < high ? Inside{low, high} : Inside{0, 0};
}

#if defined(__AVX512F__)
inline __mmask16 bits(const Inside& part) {
    return static_cast<__mmask16>(_bzhi_u32(~0u << part.low, part.high));
}
#endif

// Reads elements from memory as floats, and writes them back.
template <class T>
struct Memory;

template <>
struct Memory<float> {
    static Floats read(const float* from) { return load<Floats>(from); }
    static void write(const Floats& value, float* to) { store(value, to); }
#if defined(__AVX512F__)
    static Floats read(const float* from, __mmask16 part) {
        return std::bit_cast<Floats>(_mm512_maskz_loadu_ps(part, from));
    }
    static void write(const Floats& value, float* to, __mmask16 part) {
        _mm512_mask_storeu_ps(to, part, std::bit_cast<__m512>(value));
    }
#endif
};

template <>
struct Memory<BFloat16> {
    using Shorts = Vector<std::uint16_t, kFloats>;
    using Words = Vector<std::uint32_t, kFloats>;

    static Floats read(const BFloat16* from) { return widened(load<Shorts>(from)); }
    static void write(const Floats& value, BFloat16* to) { store(narrowed(value), to); }
#if defined(__AVX512F__)
    static Floats read(const BFloat16* from, __mmask16 part) {
        return widened(std::bit_cast<Shorts>(_mm256_maskz_loadu_epi16(part, from)));
    }
    static void write(const Floats& value, BFloat16* to, __mmask16 part) {
        _mm256_mask_storeu_epi16(to, part, std::bit_cast<__m256i>(narrowed(value)));
    }
#endif

   private:
    static Floats widened(Shorts x) { return std::bit_cast<Floats>(__builtin_convertvector(x, Words) << 16); }
    // Rounds to nearest, ties to even; a NaN stays a NaN.
    static Shorts narrowed(const Floats& x) {
        const Words bits = std::bit_cast<Words>(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
        return __builtin_convertvector((x == x ? rounded : bits | 0x400000u) >> 16, Shorts);
    }
};

// Loads zeros elsewhere and touches no other memory.
template <class T>
Floats load_between(const T* from, const Inside& part) {
#if defined(__AVX512F__)
    return Memory<T>::read(from, bits(part));
#else
    if (part.low == 0 && part.high == kFloats) return Memory<T>::read(from);
    Floats result{};
    for (int i = part.low; i < part.high; ++i) result[i] = widen(from[i]);
    return result;
#endif
}

template <class T>
void store_first(const Floats& value, int count, T* to) {
#if defined(__AVX512F__)
    Memory<T>::write(value, to, bits({0, count}));
#else
    if (count == kFloats) return Memory<T>::write(value, to);
    T all[kFloats];
    Memory<T>::write(value, all);
    for (int i = 0; i < count; ++i) to[i] = all[i];
#endif
}

// Transposes a square of vectors in place.
inline void transpose(Floats* rows) {
    Floats next[kFloats];
    for (int round = 1; round < kFloats; round *= 2) {
        for (int i = 0; i < kFloats / 2; ++i) {
            const Pair<Floats> zipped = zip(rows[i], rows[i + kFloats / 2]);
            next[2 * i] = zipped.first;
            next[2 * i + 1] = zipped.second;
        }
        for (int i = 0; i < kFloats; ++i) rows[i] = next[i];
    }
}

}  // namespace nmcompile::NMCOMPILE_ISA
