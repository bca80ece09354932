// Two rows of 4x4 tiles, one tile per lane: from their elements to masks, pruned elements and both packed forms.
//
// A packed form holds the two kept elements of every group of four, in order, and their places in the group, two bits
// each. The places of the first group are in the low half of a byte, those of the next group in the high half.
#pragma once

#include <bit>
#include <cstdint>

#include "machine/lanes.h"
#include "machine/storage.h"
#include "transposable/tile_search.h"

namespace nmcompile::NMCOMPILE_ISA {

static_assert(std::endian::native == std::endian::little, "four bytes of a lane are stored in the order of their bits");

template <class T>
constexpr int kPanelColumns = 4 * Lanes<T>::kCount;

// Eight rows of kPanelColumns elements and their outputs; `stride` from row to row. Elements of a row are contiguous.
// Unwanted outputs are null.
template <class T>
struct Panel {
    template <class Element>
    struct Rows {
        Element* data;
        std::int64_t stride;
        Element* operator[](int row) const { return data + row * stride; }
        explicit operator bool() const { return data != nullptr; }
    };
    Rows<const T> x;                                   // 8 x kPanelColumns
    Rows<std::uint8_t> mask;                           // 8 x kPanelColumns
    Rows<T> pruned;                                    // 8 x kPanelColumns
    Rows<T> forward_values, backward_values;           // 8 x kPanelColumns / 2, 4 x kPanelColumns
    Rows<std::uint8_t> forward_indices;                // 8 x kPanelColumns / 8
    Rows<std::uint8_t> backward_indices;               // 1 x kPanelColumns
};

// Loads the elements of T as integers in lanes, and stores them.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 2, std::uint16_t, typename Lanes<T>::Int>;

template <class T>
inline typename Lanes<T>::Ints read(const T* from) {
    using L = Lanes<T>;
    return __builtin_convertvector(load<Vector<Stored<T>, L::kCount>>(from), typename L::Ints);
}

// Stores past the caches or not.
template <bool Stream, class Vector>
inline void put(const Vector& vector, void* to) {
    if constexpr (Stream) {
        stream(vector, to);
    } else {
        store(vector, to);
    }
}

template <bool Stream, class T>
inline void write(typename Lanes<T>::Ints lanes, T* to) {
    put<Stream>(__builtin_convertvector(lanes, Vector<Stored<T>, Lanes<T>::kCount>), to);
}

// Returns |x| of elements as read by `read`.
template <class T>
inline typename Lanes<T>::Reals magnitude(typename Lanes<T>::Ints x) {
    using L = Lanes<T>;
    using Reals = typename L::Reals;
    using Ints = typename L::Ints;
    if constexpr (std::is_same_v<T, BFloat16>) {
        return std::bit_cast<Reals>((x & 0x7FFF) << 16);
    } else if constexpr (std::is_same_v<T, Half>) {
        // As `widen` in storage.h.
        const Ints shifted = (x & 0x7FFF) << 13;
        const Reals finite = std::bit_cast<Reals>(shifted) * 0x1p112f;
        return shifted >= (0x7C00 << 13) ? std::bit_cast<Reals>(shifted | 0x7F800000) : finite;
    } else {
        return std::bit_cast<Reals>(x & std::numeric_limits<typename L::Int>::max());
    }
}

// Returns the mask with rows and columns exchanged.
template <class Ints>
inline Ints transpose_bits(Ints mask) {
    const auto exchange = [](Ints bits, int distance, int lower) {
        const Ints differ = (bits ^ (bits >> distance)) & lower;
        return bits ^ differ ^ (differ << distance);
    };
    return exchange(exchange(mask, 3, 0x0A0A), 6, 0x00CC);
}

// Returns for each group of four bits, two of them set, the places of the two: the lower in two bits, the higher in the
// next.
template <class Ints>
inline Ints places(Ints mask) {
    constexpr int kEach = 0x1111;
    const Ints b0 = mask, b1 = mask >> 1, b2 = mask >> 2, b3 = mask >> 3;
    const Ints lower = (~b0 & b1 & kEach) | (~(b0 | b1) & kEach) << 1;
    const Ints higher = ((b3 | ~b2) & kEach) | ((b3 | b2) & kEach) << 1;
    return lower | higher << 2;
}

// Returns the four groups of four bits as four bytes.
template <class Ints>
inline Ints spread(Ints groups) {
    groups = (groups | groups << 8) & 0x00FF00FF;
    return (groups | groups << 4) & 0x0F0F0F0F;
}

template <class T, bool Stream>
class PanelPruner {
   public:
    explicit PanelPruner(const Panel<T>& panel) : panel_(panel) {}

    void run() {
        const Bytes upper = prune_tiles(0);
        const Bytes lower = prune_tiles(1);
        if (panel_.backward_indices) put<Stream>(upper | lower << 4, panel_.backward_indices.data);
    }

   private:
    using L = Lanes<T>;
    using Ints = typename L::Ints;
    using Reals = typename L::Reals;
    using Bytes = Vector<std::int32_t, L::kCount>;  // four bytes of each tile

    static constexpr int kCount = L::kCount;

    static Bytes bytes(Ints lanes) { return __builtin_convertvector(lanes, Bytes); }

    // Prunes one row of tiles; returns the places of each column's kept elements, a byte per column.
    Bytes prune_tiles(int half) {
        const int top = 4 * half;
        Ints x[16];
        for (int row = 0; row < 4; ++row) read_row(panel_.x[top + row], x + 4 * row);
        Reals a[16];
        for (int e = 0; e < 16; ++e) a[e] = magnitude<T>(x[e]);
        make_summable<T>(a);
        const Ints mask = TileSearch<T>::run(a);
        if (panel_.mask) write_mask(mask, top);

        Ints kept[16];  // all ones where kept
        for (int e = 0; e < 16; ++e) kept[e] = (mask & (1 << e)) != 0;
        for (int row = 0; panel_.pruned && row < 4; ++row) {
            Ints pruned[4];
            for (int c = 0; c < 4; ++c) pruned[c] = x[4 * row + c] & kept[4 * row + c];
            write_row(pruned, panel_.pruned[top + row]);
        }
        if (panel_.forward_values) {
            for (int row = 0; row < 4; ++row) {
                const auto [first, second] = kept_two(x + 4 * row, kept + 4 * row, 1);
                const auto [left, right] = zip(first, second);
                T* const to = panel_.forward_values[top + row];
                write<Stream>(left, to);
                write<Stream>(right, to + kCount);
            }
            write_forward_indices(bytes(spread(places(mask))), top);
        }
        if (!panel_.backward_values) return Bytes{};
        Ints upper[4], lower[4];
        for (int column = 0; column < 4; ++column) {
            const auto [first, second] = kept_two(x + column, kept + column, 4);
            upper[column] = first;
            lower[column] = second;
        }
        write_row(upper, panel_.backward_values[top / 2]);
        write_row(lower, panel_.backward_values[top / 2 + 1]);
        return bytes(spread(places(transpose_bits(mask))));
    }

    // Puts element 4 * t + c into lane t of x[c].
    static void read_row(const T* from, Ints* x) {
        const auto [even_left, odd_left] = unzip(read(from), read(from + kCount));
        const auto [even_right, odd_right] = unzip(read(from + 2 * kCount), read(from + 3 * kCount));
        const auto [x0, x2] = unzip(even_left, even_right);
        const auto [x1, x3] = unzip(odd_left, odd_right);
        x[0] = x0, x[1] = x1, x[2] = x2, x[3] = x3;
    }

    static void write_row(const Ints* x, T* to) {
        const auto [even_left, even_right] = zip(x[0], x[2]);
        const auto [odd_left, odd_right] = zip(x[1], x[3]);
        const auto [first, second] = zip(even_left, odd_left);
        const auto [third, fourth] = zip(even_right, odd_right);
        write<Stream>(first, to);
        write<Stream>(second, to + kCount);
        write<Stream>(third, to + 2 * kCount);
        write<Stream>(fourth, to + 3 * kCount);
    }

    // Returns the two kept elements of a group of four.
    static Pair<Ints> kept_two(const Ints* x, const Ints* kept, int stride) {
        const auto choose = [](Ints condition, Ints yes, Ints no) { return condition ? yes : no; };
        return {choose(kept[0], x[0], choose(kept[stride], x[stride], x[2 * stride])),
                choose(kept[3 * stride], x[3 * stride], choose(kept[2 * stride], x[2 * stride], x[stride]))};
    }

    void write_mask(Ints mask, int top) const {
        for (int row = 0; row < 4; ++row) {
            // The factor copies each four bits to the start of a byte of their own.
            const Bytes four = bytes(mask >> (4 * row) & 15);
            put<Stream>(four * 0x00204081 & 0x01010101, panel_.mask[top + row]);
        }
    }

    // A byte joins neighbouring tiles.
    void write_forward_indices(Bytes codes, int top) const {
        std::uint32_t tiles[kCount];
        store(codes, tiles);
        for (int row = 0; row < 4; ++row) {
            std::uint8_t* const to = panel_.forward_indices[top + row];
            for (int t = 0; t < kCount / 2; ++t) {
                const std::uint32_t both = tiles[2 * t] | tiles[2 * t + 1] << 4;
                to[t] = static_cast<std::uint8_t>(both >> (8 * row));
            }
        }
    }

    const Panel<T>& panel_;
};

}  // namespace nmcompile::NMCOMPILE_ISA
