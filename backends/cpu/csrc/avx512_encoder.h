// Writes the few AVX-512 instructions that generated code consists of, as bytes. Intel's manual, volume 2, section 2.7, and
// the instructions' own pages say what they mean.
#pragma once

#include <cstdint>
#include <cstring>

namespace nmcompile {

// The registers with the arguments of a function, in order, on Linux.
enum class Argument : int { first = 7, second = 6, third = 2, fourth = 1 };

// sum += vector * value, for a value in memory that all lanes share.
struct MultiplyAdd {
    int prefix;
    int opcode;
};

constexpr MultiplyAdd kAddSingles{1, 0xB8};  // vfmadd231ps
constexpr MultiplyAdd kAddPairs{2, 0x52};    // vdpbf16ps

class Avx512Encoder {
public:
    static constexpr int kMultiplyAddBytes = 7, kLoadBytes = 10;

    explicit Avx512Encoder(std::uint8_t* to) : at_(to) {}
    std::uint8_t* at() const { return at_; }

    // The byte of a multiply-add that says which vector it reads: the only one that depends on it for vectors from 16 on.
    static constexpr int kVectorByte = 2;
    static constexpr std::uint8_t vector_byte(const MultiplyAdd& kind, int vector) {
        return static_cast<std::uint8_t>((~vector & 15) << 3 | 4 | kind.prefix);
    }

    // `value`: in floats from the address in the register, -128 to 127.
    void multiply_add(const MultiplyAdd& kind, int sum, int vector, Argument address, int value) {
        start(2, kind.prefix, sum, vector, true);
        byte(kind.opcode);
        byte(0x40 | (sum & 7) << 3 | static_cast<int>(address));
        byte(value);
    }

    void load(int vector, Argument address, std::int32_t bytes) { move(0x10, vector, address, bytes); }
    void store(int vector, Argument address, std::int32_t bytes) { move(0x11, vector, address, bytes); }

    // vpxord: whatever is in vector 0, with itself.
    void clear(int vector) {
        start(1, 1, vector, 0, false);
        byte(0xEF);
        byte(0xC0 | (vector & 7) << 3);
    }

    // Returns where the distance goes.
    std::uint8_t* jump() {
        byte(0xE9);
        at_ += 4;
        return at_ - 4;
    }
    void land(std::uint8_t* jump) const {
        const auto distance = static_cast<std::int32_t>(at_ - jump - 4);
        std::memcpy(jump, &distance, sizeof(distance));
    }

    void leave() {
        for (const int code : {0xC5, 0xF8, 0x77}) byte(code);  // vzeroupper
        byte(0xC3);
    }

private:
    void byte(int value) { *at_++ = static_cast<std::uint8_t>(value); }

    // The four bytes of the prefix EVEX for 512 bits: the opcode's map, the two registers, and whether the third operand
    // is one float for all lanes.
    void start(int map, int prefix, int reg, int other, bool shared) {
        byte(0x62);
        byte((~reg >> 3 & 1) << 7 | 3 << 5 | (~reg >> 4 & 1) << 4 | map);
        byte((~other & 15) << 3 | 4 | prefix);
        byte(2 << 5 | shared << 4 | (~other >> 4 & 1) << 3);
    }

    void move(int opcode, int vector, Argument address, std::int32_t bytes) {
        start(1, 0, vector, 0, false);
        byte(opcode);
        byte(0x80 | (vector & 7) << 3 | static_cast<int>(address));
        std::memcpy(at_, &bytes, sizeof(bytes));
        at_ += sizeof(bytes);
    }

    std::uint8_t* at_;
};

}  // namespace nmcompile
