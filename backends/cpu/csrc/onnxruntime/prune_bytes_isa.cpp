// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.
//
// Loops over blocks, without branches, which the compiler makes vectors of.

#include "onnxruntime/prune_bytes_isa.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

using Index = std::int64_t;

template <class Key>
inline Key larger(Key a, Key b) {
    return a > b ? a : b;
}

template <class Key>
inline Key smaller(Key a, Key b) {
    return a < b ? a : b;
}

template <class Key>
inline void order(Key& a, Key& b) {
    const Key first = larger(a, b);
    b = smaller(a, b);
    a = first;
}

// Puts four keys in falling order.
template <class Key>
inline void sort(Key* k) {
    order(k[0], k[1]);
    order(k[2], k[3]);
    order(k[0], k[2]);
    order(k[1], k[3]);
    order(k[1], k[2]);
}

// Returns the fourth largest of eight keys, and changes their order.
//
// If i of the four largest are among the first half, it is the smaller of the i-th there and the (4 - i)-th of the
// second half; any other i gives something that is no larger.
template <class Key>
inline Key fourth(Key* k) {
    sort(k);
    sort(k + 4);
    const Key inner = larger(smaller(k[0], k[6]), smaller(k[1], k[5]));
    return larger(larger(inner, smaller(k[2], k[4])), larger(k[3], k[7]));
}

// Prunes `count` blocks, `next` elements apart, of elements `step` apart.
template <class Key, int kStep, int kNext>
inline void prune_blocks(const std::uint8_t* x, std::uint8_t* pruned, Index count, Index pixels) {
    const Index step = kStep ? kStep : pixels;
#pragma GCC ivdep
    for (Index b = 0; b < count; ++b) {
        std::uint8_t q[kBytesBlock];
        Key keys[kBytesBlock], falling[kBytesBlock];
#pragma GCC unroll 8
        for (int i = 0; i < kBytesBlock; ++i) {
            q[i] = x[b * kNext + i * step];
            keys[i] = falling[i] = static_cast<Key>(kBytesBlock * q[i] + (kBytesBlock - 1 - i));
        }
        const Key least = fourth(falling);
#pragma GCC unroll 8
        for (int i = 0; i < kBytesBlock; ++i) {
            pruned[b * kNext + i * step] = keys[i] >= least ? q[i] : std::uint8_t{0};
        }
    }
}

template <class Key>
void prune(const BytesJob& job, Index first, Index last) {
    const Index size = kBytesBlock * job.pixels;
    const std::uint8_t* x = job.x + first * size;
    std::uint8_t* pruned = job.pruned + first * size;
    if (job.pixels == 1) return prune_blocks<Key, 1, kBytesBlock>(x, pruned, last - first, 1);
    for (Index group = first; group < last; ++group, x += size, pruned += size) {
        prune_blocks<Key, 0, 1>(x, pruned, job.pixels, job.pixels);
    }
}

}  // namespace

void prune_bytes(const BytesJob& job, std::int64_t first, std::int64_t last) {
    job.wide ? prune<std::uint16_t>(job, first, last) : prune<std::uint8_t>(job, first, last);
}

}  // namespace nmcompile::NMCOMPILE_ISA
