// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "onnxruntime/prune_bytes_isa.h"

#include "machine/lanes.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

constexpr int kVector = NMCOMPILE_VECTOR_BYTES, kHalf = 8, kVectors = kBytesBlock;
using Bytes = Vector<std::uint8_t, kVector>;

// Puts two keys in falling order.
inline void order(Bytes& a, Bytes& b) {
    const Bytes first = larger(a, b);
    b = a < b ? a : b;
    a = first;
}

inline void order_four(Bytes* k) {
    order(k[0], k[1]);
    order(k[2], k[3]);
    order(k[0], k[2]);
    order(k[1], k[3]);
    order(k[1], k[2]);
}

inline Bytes smaller(Bytes a, Bytes b) { return a < b ? a : b; }

// Returns the fourth largest of eight keys, and changes their order.
//
// If i of the four largest are in the first half, it is the smaller of the i-th there and the (4 - i)-th of the second
// half; any other i gives something that is no larger.
inline Bytes fourth(Bytes* k) {
    order_four(k);
    order_four(k + 4);
    const Bytes one_or_three = larger(smaller(k[0], k[6]), smaller(k[2], k[4]));
    return larger(larger(one_or_three, smaller(k[1], k[5])), larger(k[3], k[7]));
}

// Interleaves the first or the last half of each sixteen bytes of two vectors.
template <int kFrom>
inline Bytes interleaved(Bytes a, Bytes b) {
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (I / 16 * 16 + kFrom + I % 16 / 2 + I % 2 * kVector)...);
    }(std::make_integer_sequence<int, kVector>{});
}

// Exchanges two bits in the numbers of all bytes. The bit kBit of the number of a byte's vector becomes the lowest of its
// place in sixteen; the highest bit of the place replaces it.
template <int kBit>
inline void exchange(Bytes* v) {
    for (int i = 0; i < kVectors; ++i) {
        if (i >> kBit & 1) continue;
        const Bytes a = v[i], b = v[i + (1 << kBit)];
        v[i] = interleaved<0>(a, b);
        v[i + (1 << kBit)] = interleaved<kHalf>(a, b);
    }
}

// Where a vector belongs: four exchanges leave place `rotated(i)` of all blocks in vector i. Three more put the blocks
// together again and leave vector `rotated(i)` there.
constexpr int rotated(int i) { return (2 * i) % kVectors + i / (kVectors / 2); }

// By keys 8 q + (7 - i), of which no two in a block are equal: an integer stays if its key is at least the fourth largest.
inline void select_by_key(Bytes* q) {
    Bytes keys[kVectors], falling[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        keys[i] = falling[i] = kBytesBlock * q[i] + static_cast<std::uint8_t>(kBytesBlock - 1 - rotated(i));
    }
    const Bytes least = fourth(falling);
    for (int i = 0; i < kVectors; ++i) q[i] = keys[i] >= least ? q[i] : Bytes{};
}

// By the number of integers that are ahead: larger ones, and equal ones that come first.
inline void select_by_rank(Bytes* q) {
    const Bytes one = Bytes{} + std::uint8_t{1};
    Bytes ahead[kVectors] = {};
    for (int i = 0; i < kVectors; ++i) {
        for (int j = 0; j < kVectors; ++j) {
            if (rotated(i) >= rotated(j)) continue;
            ahead[j] += q[i] >= q[j] ? one : Bytes{};
            ahead[i] += q[i] >= q[j] ? Bytes{} : one;
        }
    }
    for (int i = 0; i < kVectors; ++i) q[i] = ahead[i] < std::uint8_t{4} ? q[i] : Bytes{};
}

template <bool kWide>
inline void prune_vectors(const std::uint8_t* x, std::uint8_t* pruned) {
    Bytes q[kVectors];
    for (int i = 0; i < kVectors; ++i) q[i] = load<Bytes>(x + i * kVector);
    exchange<2>(q);
    exchange<1>(q);
    exchange<0>(q);
    exchange<2>(q);
    kWide ? select_by_rank(q) : select_by_key(q);
    exchange<1>(q);
    exchange<0>(q);
    exchange<2>(q);
    for (int i = 0; i < kVectors; ++i) store(q[i], pruned + rotated(i) * kVector);
}

template <bool kWide>
void prune(const std::uint8_t* x, std::uint8_t* pruned, std::int64_t bytes) {
    constexpr int kBytes = kVectors * kVector;
    std::int64_t at = 0;
    for (; at + kBytes <= bytes; at += kBytes) prune_vectors<kWide>(x + at, pruned + at);
    if (at == bytes) return;
    std::uint8_t rest[kBytes] = {};
    __builtin_memcpy(rest, x + at, static_cast<std::size_t>(bytes - at));
    prune_vectors<kWide>(rest, rest);
    __builtin_memcpy(pruned + at, rest, static_cast<std::size_t>(bytes - at));
}

}  // namespace

void prune_bytes(const std::uint8_t* x, std::uint8_t* pruned, std::int64_t blocks, bool wide) {
    wide ? prune<true>(x, pruned, blocks * kBytesBlock) : prune<false>(x, pruned, blocks * kBytesBlock);
}

}  // namespace nmcompile::NMCOMPILE_ISA
