// Writes the few instructions that generated code consists of, on vectors of 512 bits. Their encodings are in Intel's
// manual, volume 2: section 2.7 and the page of each instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace nmcompile {

// Registers that hold addresses: a function's first four arguments, and one more. The fifth and sixth are numbers here.
enum class Address : int { first = 7, second = 6, third = 2, fourth = 1, other = 0 };

// sum += vector * value, where all lanes share the value, four bytes in memory.
struct MultiplyAdd {
    int prefix, opcode;
};
constexpr MultiplyAdd kAddSingles{1, 0xB8};  // vfmadd231ps
constexpr MultiplyAdd kAddPairs{2, 0x52};    // vdpbf16ps

class Avx512Encoder {
public:
    static constexpr int kMultiplyAddBytes = 8, kAccessBytes = 10, kShiftBytes = 7, kBlendBytes = 6, kAddBytes = 3;

    explicit Avx512Encoder(std::uint8_t* to) : at_(to) {}
    std::uint8_t* at() const { return at_; }

    // `value` is an offset of -128 to 127 values from the address. The address takes one byte more than it needs: so
    // instructions have eight bytes, and one vector operation changes several.
    void multiply_add(const MultiplyAdd& kind, int sum, int vector, Address address, int value) {
        start({.map = 2, .prefix = kind.prefix, .shared = 1}, sum, vector, static_cast<int>(address));
        byte(kind.opcode);
        byte(0x44 | (sum & 7) << 3);
        byte(0x20 | static_cast<int>(address));
        byte(value);
    }
    // The byte of the instruction that names the vector. For vectors from 16 on it is the only byte that depends on the
    // vector.
    static constexpr int kVectorByte = 2;
    static constexpr std::uint8_t vector_byte(const MultiplyAdd& kind, int vector) {
        return static_cast<std::uint8_t>((~vector & 15) << 3 | 4 | kind.prefix);
    }

    void load(int vector, Address address, std::int32_t bytes) { access(0x10, vector, address, bytes); }
    void store(int vector, Address address, std::int32_t bytes) { access(0x11, vector, address, bytes); }

    // XORs vector 0 with itself, whatever it holds.
    void clear(int vector) { combine({.map = 1, .prefix = 1}, 0xEF, vector, 0, 0); }

    // Shift each 32 bits of a vector down or up by 16.
    void shift_down(int to, int from) { shift(2, to, from); }
    void shift_up(int to, int from) { shift(6, to, from); }

    // Takes the lower 16 of each 32 bits from one vector, the higher from another; call `begin_blends` first.
    void blend(int to, int low, int high) { combine({.map = 2, .prefix = 1, .wide = 1, .mask = 1}, 0x66, to, low, high); }
    void begin_blends() {
        bytes({0xB8, 0xAA, 0xAA, 0xAA, 0xAA});  // mov eax, the bits of the higher halves
        bytes({0xC5, 0xFB, 0x92, 0xC8});        // kmovd k1, eax
    }

    void set_other(Address from, std::int32_t bytes_on) {
        bytes({0x48, 0x8D, 0x80 | static_cast<int>(from)});  // lea rax
        number(bytes_on);
    }
    void add_sixth(Address to) { bytes({0x4C, 0x01, 0xC8 | static_cast<int>(to)}); }

    // Jumps over `length` bytes if the fifth argument is zero.
    void skip_unless_fifth(std::int32_t length) {
        bytes({0x45, 0x85, 0xC0, 0x0F, 0x84});  // test r8d, r8d; je
        number(length);
    }

    void leave() { bytes({0xC5, 0xF8, 0x77, 0xC3}); }  // vzeroupper; ret

private:
    struct Form {
        int map = 0, prefix = 0, wide = 0, shared = 0, mask = 0;
    };

    void byte(int value) { *at_++ = static_cast<std::uint8_t>(value); }
    void bytes(std::initializer_list<int> values) {
        for (const int value : values) byte(value);
    }
    void number(std::int32_t value) {
        std::memcpy(at_, &value, sizeof(value));
        at_ += sizeof(value);
    }

    // The EVEX prefix, with those bits of three registers for which other bytes have no room.
    void start(const Form& form, int reg, int other, int last) {
        byte(0x62);
        byte((~reg & 8) << 4 | (~last & 16) << 2 | (~last & 8) << 2 | (~reg & 16) | form.map);
        byte(form.wide << 7 | (~other & 15) << 3 | 4 | form.prefix);
        byte(2 << 5 | form.shared << 4 | (~other & 16) >> 1 | form.mask);
    }

    void access(int opcode, int vector, Address address, std::int32_t offset) {
        start({.map = 1}, vector, 0, static_cast<int>(address));
        byte(opcode);
        byte(0x80 | (vector & 7) << 3 | static_cast<int>(address));
        number(offset);
    }

    void combine(const Form& form, int opcode, int to, int first, int second) {
        start(form, to, first, second);
        byte(opcode);
        byte(0xC0 | (to & 7) << 3 | (second & 7));
    }

    void shift(int direction, int to, int from) {
        start({.map = 1, .prefix = 1}, direction, to, from);
        byte(0x72);
        byte(0xC0 | direction << 3 | (from & 7));
        byte(16);
    }

    std::uint8_t* at_;
};

}  // namespace nmcompile
