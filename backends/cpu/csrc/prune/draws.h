// Uniform numbers of many blocks at once: Philox4x32-10 as nmcompile/pruning/philox.py defines it.
#pragma once

#include <cstdint>

#include "prune/block_run.h"
#include "prune/rows.h"

namespace nmcompile::NMCOMPILE_ISA {

constexpr int kNumbers = NMCOMPILE_VECTOR_BYTES / sizeof(float);  // numbers per vector
using Floats = Vector<float, kNumbers>;
using Longs = Vector<std::uint64_t, kNumbers / 2>;  // 32-bit words; the other half of each lane is arbitrary

// Multiplies the low halves.
NMCOMPILE_INLINE Longs multiply(Longs a, std::uint32_t b) {
    const Longs factor = Longs{} + b;
#if defined(__AVX512F__)
    return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
    return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__x86_64__)
    return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
    return (a & 0xFFFFFFFFu) * factor;
#endif
}

struct Words {
    Longs word[4];
};

// The keys of the ten rounds.
struct RoundKeys {
    explicit RoundKeys(std::uint64_t key) {
        auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round) {
            low[round] = Longs{} + k0;
            high[round] = Longs{} + k1;
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
    }
    Longs low[10], high[10];
};

// Computes `Count` vectors of counters, round by round: they hide each other's latency.
template <int Count>
NMCOMPILE_INLINE void philox4x32(const Longs* counters, const RoundKeys& keys, Words* words) {
    for (int i = 0; i < Count; ++i) words[i] = Words{{counters[i], counters[i] >> 32, Longs{}, Longs{}}};
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < Count; ++i) {
            auto& [c0, c1, c2, c3] = words[i].word;
            const Longs p0 = multiply(c0, 0xD2511F53), p1 = round == 0 ? Longs{} : multiply(c2, 0xCD9E8D57);
            c0 = (p1 >> 32) ^ c1 ^ keys.low[round];
            c1 = p1;
            c2 = (p0 >> 32) ^ c3 ^ keys.high[round];
            c3 = p0;
        }
    }
}

NMCOMPILE_INLINE Longs pair(Longs low, Longs high) { return (low & 0xFFFFFFFFu) | (high << 32); }

NMCOMPILE_INLINE Floats uniform(Longs words) {
    const auto high = __builtin_bit_cast(Vector<std::uint32_t, kNumbers>, words) >> 8;
    return __builtin_convertvector(__builtin_bit_cast(IntsOf<Floats>, high), Floats) * 0x1p-24f;
}

inline Longs counting() {
    Longs result = {};
    for (int l = 0; l < kNumbers / 2; ++l) result[l] = static_cast<std::uint64_t>(l);
    return result;
}

// Consecutive numbers, computed on demand. Four share a counter.
class Window {
   public:
    static constexpr int kMost = 8 * kNumbers;  // numbers that one call can ask for

    // Returns the numbers first, ..., first + count - 1.
    NMCOMPILE_INLINE const float* at(std::uint64_t first, int count, const RoundKeys& keys) {
        if (first - begin_ + static_cast<std::uint64_t>(count) > size_ || first < begin_) compute(first, count, keys);
        return numbers_ + (first - begin_);
    }

   private:
    static constexpr int kAtOnce = 3;  // vectors of counters; on AVX2, two take longer and four do not fit the registers
    static constexpr int kStep = kAtOnce * 2 * kNumbers;

    [[gnu::noinline]] void compute(std::uint64_t first, int count, const RoundKeys& keys) {
        begin_ = first & ~std::uint64_t{3};
        const auto wanted = first - begin_ + static_cast<std::uint64_t>(count);
        for (size_ = 0; size_ < wanted; size_ += kStep) {
            Longs counters[kAtOnce];
            for (int i = 0; i < kAtOnce; ++i) counters[i] = counting() + (((begin_ + size_) >> 2) + i * (kNumbers / 2));
            Words words[kAtOnce];
            philox4x32<kAtOnce>(counters, keys, words);
            for (int i = 0; i < kAtOnce; ++i) put(words[i], numbers_ + size_ + i * 2 * kNumbers);
        }
    }
    static NMCOMPILE_INLINE void put(const Words& words, float* to) {
        const auto [first, second] = zip(pair(words.word[0], words.word[1]), pair(words.word[2], words.word[3]));
        store(uniform(first), to);
        store(uniform(second), to + kNumbers);
    }

    std::uint64_t begin_ = 0, size_ = 0;
    alignas(64) float numbers_[kMost + kStep];
};

// Returns one number for each lane, of any counters.
inline Floats scattered(const std::uint64_t* numbers, const RoundKeys& keys) {
    const Longs counters[2] = {load<Longs>(numbers) >> 2, load<Longs>(numbers + kNumbers / 2) >> 2}, one = Longs{} + 1;
    Words words[2];
    philox4x32<2>(counters, keys, words);
    Vector<std::uint32_t, kNumbers> halves[2];
    for (int h = 0; h < 2; ++h) {
        const Longs number = load<Longs>(numbers + h * (kNumbers / 2));
        const auto odd = equal(number & one, one), upper = equal(number & (one + one), one + one);
        const auto& [c0, c1, c2, c3] = words[h].word;
        const Longs low = select(odd, c1, c0), high = select(odd, c3, c2);
        halves[h] = __builtin_bit_cast(Vector<std::uint32_t, kNumbers>, select(upper, high, low));
    }
    return uniform(__builtin_bit_cast(Longs, unzip(halves[0], halves[1]).first));
}

// The uniform numbers of the units of a run, `Draws` for each of the `Blocks` blocks of a unit.
template <int Blocks, int Draws>
class UnitDraws {
   public:
    UnitDraws(const Run& run, std::uint64_t key) : run_(run), keys_(key), first_(number(0)) {
        const bool even = run.numbers_are_even();
        joined_ = even && run.number_inner == Blocks && (Blocks == 1 || run.number_block == 1);
        consecutive_ = even && run.number_inner == 1;
    }

    // Returns the numbers of the units lane, ..., lane + kNumbers - 1: those of block b are u[b * Draws], ...
    NMCOMPILE_INLINE void get(std::int64_t lane, Floats* u) {
        const auto unit = static_cast<std::uint64_t>(lane);
        if (joined_) return consecutive<Blocks * Draws>(windows_[0], first_ + unit * Blocks, u);
        for (int b = 0; b < Blocks; ++b) {
            const std::uint64_t offset = static_cast<std::uint64_t>(b) * run_.number_block;
            if (consecutive_) {
                consecutive<Draws>(windows_[b], first_ + unit + offset, u + b * Draws);
            } else {
                Floats apart[Draws];
                scatter(lane, offset, apart);
                for (int d = 0; d < Draws; ++d) u[b * Draws + d] = apart[d];
            }
        }
    }

   private:
    static_assert(Blocks <= 4 && Blocks * Draws * kNumbers <= Window::kMost);

    std::uint64_t number(std::int64_t lane) const {
        const std::int64_t unit = run_.first + lane;
        return run_.number + static_cast<std::uint64_t>(unit % run_.inner) * run_.number_inner +
               static_cast<std::uint64_t>(unit / run_.inner) * run_.number_outer;
    }

    template <int Each>
    NMCOMPILE_INLINE void consecutive(Window& window, std::uint64_t number, Floats* u) {
        const float* from = window.at(number * Draws, Each * kNumbers, keys_);
        for (int i = 0; i < Each; ++i) u[i] = load<Floats>(from + i * kNumbers);
        unzip_rows<Each>(u);
    }

    [[gnu::noinline]] void scatter(std::int64_t lane, std::uint64_t offset, Floats* u) {
        std::uint64_t numbers[kNumbers];
        std::int64_t place = (run_.first + lane) % run_.inner;
        std::uint64_t next = number(lane) + offset;
        for (int l = 0; l < kNumbers; ++l) {
            numbers[l] = next * Draws;
            next += run_.number_inner;
            if (++place == run_.inner) {
                place = 0;
                next += run_.number_outer - static_cast<std::uint64_t>(run_.inner) * run_.number_inner;
            }
        }
        for (int d = 0; d < Draws; ++d) {
            u[d] = scattered(numbers, keys_);
            for (std::uint64_t& number : numbers) ++number;
        }
    }

    const Run& run_;
    RoundKeys keys_;
    std::uint64_t first_;
    bool joined_, consecutive_;
    Window windows_[Blocks];
};

}  // namespace nmcompile::NMCOMPILE_ISA
