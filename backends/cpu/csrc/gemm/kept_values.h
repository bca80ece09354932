// Packs the sparse operand: the two values that each four keeps, and their places.
#pragma once

#include <array>
#include <bit>
#include <cstring>

#include "gemm/dense_panel.h"
#include "gemm/gemm_isa.h"

namespace nmcompile::NMCOMPILE_ISA {

#if defined(__AVX512F__)
// What eight elements keep, indexed by which of them are not zero: two of each four, filled up with the first zeros.
struct KeptOfEight {
    std::uint32_t places = 0;  // four bytes
    std::uint16_t pairs = 0;   // two bytes: for each four, the number of its pair of places among the six pairs
    std::uint8_t mask = 0;
    bool excess = false;
};

constexpr int kPairs = 6;
constexpr int kPairOf[3][4] = {{0, 0, 1, 2}, {0, 0, 3, 4}, {0, 0, 0, 5}};

constexpr std::array<KeptOfEight, 256> kept_of_eight() {
    std::array<KeptOfEight, 256> table;
    for (int nonzero = 0; nonzero < 256; ++nonzero) {
        KeptOfEight& entry = table[nonzero];
        for (int four = 0; four < 2; ++four) {
            int mask = nonzero >> 4 * four & 15;
            entry.excess |= std::popcount(static_cast<unsigned>(mask)) > 2;
            for (int place = 0; std::popcount(static_cast<unsigned>(mask)) < 2; ++place) mask |= 1 << place;
            int kept[2] = {};
            for (int place = 0, count = 0; place < 4 && count < 2; ++place) {
                if (mask >> place & 1) kept[count++] = place;
            }
            for (int i = 0; i < 2; ++i) {
                entry.places |= static_cast<std::uint32_t>(4 * four + kept[i]) << 8 * (2 * four + i);
            }
            entry.pairs |= static_cast<std::uint16_t>((kPairs * four + kPairOf[kept[0]][kept[1]]) << 8 * four);
            entry.mask |= mask << 4 * four;
        }
    }
    return table;
}

constexpr std::array<KeptOfEight, 256> kKeptOfEight = kept_of_eight();

struct KeptOfSixteen {
    const KeptOfEight &low, &high;
    __m256 values;

    explicit KeptOfSixteen(const float* from) : KeptOfSixteen(_mm512_loadu_ps(from)) {}
    bool excess() const { return low.excess | high.excess; }

   private:
    explicit KeptOfSixteen(__m512 x) : KeptOfSixteen(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ)) {}
    KeptOfSixteen(__m512 x, unsigned nonzero) : low(kKeptOfEight[nonzero & 255]), high(kKeptOfEight[nonzero >> 8]) {
        values = _mm512_castps512_ps256(_mm512_maskz_compress_ps(low.mask | high.mask << 8, x));
    }
};

// Packs a row of one block, value by value; `at` is the row's place in the packed arrays. Returns false if some four
// keep more than two.
inline bool pack_singles(const float* row, const KeptValues& kept, Index at) {
    bool excess = false;
    for (std::uint64_t first = 0; first < kDepthBlock; first += 16) {
        const KeptOfSixteen some(row + first);
        excess |= some.excess();
        _mm256_storeu_ps(kept.values + at + first / 2, some.values);
        const std::uint64_t places = (some.low.places | std::uint64_t{some.high.places} << 32) +
                                     first * 0x0101010101010101u + 0x0808080800000000u;
        std::memcpy(kept.places + at + first / 2, &places, sizeof(places));
    }
    return !excess;
}
#else
// As above, with vectors of any length.
inline bool pack_singles(const float* row, const KeptValues& kept, Index at) {
    FloatInts excess{};
    for (int first = 0; first < kDepthBlock; first += 4 * kFloats) {
        // One vector for each place in the fours.
        const Pair<Floats> low = unzip(load<Floats>(row + first), load<Floats>(row + first + kFloats));
        const Pair<Floats> high = unzip(load<Floats>(row + first + 2 * kFloats), load<Floats>(row + first + 3 * kFloats));
        const auto [x0, x2] = unzip(low.first, high.first);
        const auto [x1, x3] = unzip(low.second, high.second);
        const FloatInts m0 = x0 != 0.0f, m1 = x1 != 0.0f, m2 = x2 != 0.0f, m3 = x3 != 0.0f;
        excess |= (m0 + m1 + m2 + m3) < -2;
        // Two different places that cover all non-zeros; for a four of zeros, the first place twice.
        const Floats a = m0 ? x0 : m1 ? x1 : m3 ? x2 : x0;
        const Floats b = m3 ? x3 : m2 ? x2 : m0 ? x1 : x0;
        const FloatInts zero{}, one = zero + 1, two = zero + 2, three = zero + 3;
        FloatInts place_a = m0 ? zero : m1 ? one : m3 ? two : zero;
        FloatInts place_b = m3 ? three : m2 ? two : m0 ? one : zero;
        FloatInts fours;
        for (int i = 0; i < kFloats; ++i) fours[i] = first + 4 * i;
        place_a += fours;
        place_b += fours;
        const Pair<Floats> values = zip(a, b);
        const Pair<FloatInts> places = zip(place_a, place_b);
        using Bytes = Vector<std::uint8_t, kFloats>;
        store(values.first, kept.values + at + first / 2);
        store(values.second, kept.values + at + first / 2 + kFloats);
        store(__builtin_convertvector(places.first, Bytes), kept.places + at + first / 2);
        store(__builtin_convertvector(places.second, Bytes), kept.places + at + first / 2 + kFloats);
    }
    return !any(excess);
}
#endif

// Each value is a form of its own.
struct SingleValues {
    static constexpr Index kValues = kDepthBlock / 2;  // values per block
    static constexpr Index kPanelRows = kDepthBlock;
    static constexpr Index kLanes = kMostLanes;  // lanes per panel, at most
    static bool pack_row(const float* row, const KeptValues& kept, Index at) {
        return pack_singles(row, kept, at);
    }
    template <class T>
    static void make_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, float* panel, float*) {
        fill_panel(job, lanes, block, Strides::side_by_side(lanes.width), panel);
    }
};

// Without a branch, which a mask that keeps half of its elements would mispredict.
template <bool kMasked, class T>
float kept_element(const GemmJob<T>& job, Index offset) {
    const float x = widen(job.sparse[offset]);
    if constexpr (!kMasked) return x;
    const std::uint32_t keep = 0u - static_cast<std::uint32_t>(job.mask[offset] != 0);
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & keep);
}

template <bool kMasked, class T>
Floats kept_vector(const GemmJob<T>& job, Index offset) {
    const Floats x = Memory<T>::read(job.sparse + offset);
    if constexpr (!kMasked) return x;
#if defined(__AVX512F__)
    const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(job.mask + offset));
    return std::bit_cast<Floats>(_mm512_maskz_mov_ps(_mm_test_epi8_mask(mask, mask), std::bit_cast<__m512>(x)));
#else
    using Bytes = Vector<std::uint8_t, kFloats>;
    const FloatInts keep = __builtin_convertvector(load<Bytes>(job.mask + offset), FloatInts) != 0;
    return keep ? x : Floats{};
#endif
}

// Prefetches the next block of a row while this one is packed: the processor does not follow so many rows.
template <bool kMasked, class T>
void fetch_block(const GemmJob<T>& job, Index offset) {
    constexpr Index kOfLine = 64 / sizeof(T);
    for (Index i = 0; i < kDepthBlock; i += kOfLine) __builtin_prefetch(job.sparse + offset + i);
    if constexpr (kMasked) __builtin_prefetch(job.mask + offset);
}

// Where the elements of a block of depth are in a row. `step` is the distance between neighbours, or 0 if it varies.
struct DepthOfBlock {
    Index offsets[kDepthBlock] = {}, count, step;

    DepthOfBlock(const GemmAxis& axis, Index block)
        : count(smaller(kDepthBlock, axis.size - block * kDepthBlock)), step(step_of(axis)) {
        if (step != 0) {
            for (Index k = 0; k < count; ++k) offsets[k] = axis.start.offset + (block * kDepthBlock + k) * step;
            return;
        }
        Point points[kDepthBlock];
        walk(axis, block * kDepthBlock, count, points);
        for (Index k = 0; k < count; ++k) offsets[k] = points[k].offset;
        step = count > 1 ? offsets[1] - offsets[0] : 1;
        for (Index k = 2; k < count; ++k) step = offsets[k] - offsets[k - 1] == step ? step : 0;
    }

   private:
    // Returns the step of the whole axis if its digits count like a single one, else 0.
    static Index step_of(const GemmAxis& axis) {
        Index step = 0, size = 1;
        for (int d = kMaxDigits - 1; d >= 0; --d) {
            const Digit& digit = axis.digits[d];
            if (digit.size == 1) continue;
            if (size > 1 && digit.step.offset != step * size) return 0;
            if (size == 1) step = digit.step.offset;
            size *= digit.size;
        }
        return size == 1 ? 1 : step;
    }
};

// Gathers some rows of a block, with zeros after its end. Elements that are close in memory come one after the other.
template <bool kMasked, class T>
void gather_rows(const GemmJob<T>& job, const DepthOfBlock& depth, Index row, Index rows, float (*to)[kDepthBlock]) {
    const auto& [offsets, count, step] = depth;
    if (step > job.sparse_row) {
        for (Index k = 0; k < count; ++k) {
            const Index from = offsets[k] + row * job.sparse_row;
            for (Index r = 0; r < rows; ++r) to[r][k] = kept_element<kMasked>(job, from + r * job.sparse_row);
        }
    } else {
        for (Index r = 0; r < rows; ++r) {
            const Index from = (row + r) * job.sparse_row;
            if (step == 1) fetch_block<kMasked>(job, from + offsets[0] + kDepthBlock);
            Index k = 0;
            for (; step == 1 && k + kFloats <= count; k += kFloats) {
                store(kept_vector<kMasked>(job, from + offsets[0] + k), to[r] + k);
            }
            for (; k < count; ++k) to[r][k] = kept_element<kMasked>(job, from + offsets[k]);
        }
    }
    for (Index r = 0; r < rows; ++r) {
        for (Index k = count; k < kDepthBlock; ++k) to[r][k] = 0.0f;
    }
}

// Gathers the blocks of as many rows as a vector has lanes, which are contiguous in memory.
template <bool kMasked, class T>
void transpose_rows(const GemmJob<T>& job, const DepthOfBlock& depth, Index row, float (*to)[kDepthBlock]) {
    for (Index first = 0; first < kDepthBlock; first += kFloats) {
        Floats square[kFloats];
        for (Index k = 0; k < kFloats; ++k) {
            const Index from = depth.offsets[smaller(first + k, depth.count - 1)] + row;
            square[k] = first + k < depth.count ? kept_vector<kMasked>(job, from) : Floats{};
            __builtin_prefetch(job.sparse + from + kDepthBlock * depth.step);  // the next block
        }
        transpose(square);
        for (Index r = 0; r < kFloats; ++r) store(square[r], &to[r][first]);
    }
}

template <class Form, bool kMasked, class T>
bool pack_rows(const GemmJob<T>& job, const KeptValues& kept, Index block, Index row) {
    const DepthOfBlock depth(job.sparse_depth, block);
    const Index last = smaller(job.rows, row + kPackedRows);
    bool fits = true;
    while (row < last) {
        alignas(64) float gathered[kFloats][kDepthBlock];
        const Index rows = smaller(kFloats, last - row);
        if (job.sparse_row == 1 && rows == kFloats) {
            transpose_rows<kMasked>(job, depth, row, gathered);
        } else {
            gather_rows<kMasked>(job, depth, row, rows, gathered);
        }
        for (Index r = 0; r < rows; ++r, ++row) {
            fits = are_finite(gathered[r], kDepthBlock) && fits;
            fits = Form::pack_row(gathered[r], kept, (block * job.rows + row) * Form::kValues) && fits;
        }
    }
    return fits;
}

template <class Form, class T>
bool pack(const GemmJob<T>& job, const KeptValues& kept, Index block, Index row) {
    return job.mask ? pack_rows<Form, true>(job, kept, block, row) : pack_rows<Form, false>(job, kept, block, row);
}

}  // namespace nmcompile::NMCOMPILE_ISA
