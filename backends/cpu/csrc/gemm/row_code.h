// Machine code for some rows of the sparse operand, written anew for every few blocks of depth.
//
// A compiled loop finds a value's row of the panel by its address, so that every multiply-add reads a vector from a
// cache: more than processors sustain. Written code names a register: the rows of a four are loaded once for 24 rows of
// S, and what a multiply-add reads is one float, the value. From block to block only the bytes differ that name these
// registers.
#pragma once

#include <iterator>

#include "gemm/avx512_encoder.h"
#include "gemm/paired_values.h"
#include "machine/executable_memory.h"

#if defined(__AVX512F__)
namespace nmcompile::NMCOMPILE_ISA {

constexpr int kCodeRows = 24;     // of S: their sums stay in registers
constexpr int kCodeBlocks = 2;    // of depth
constexpr int kCodeLanes = 1024;  // of a tile: writing takes about as long as running for 32 of them
constexpr int kCodeCopies = 12;   // together they are larger than a first-level cache of instructions
constexpr int kFours = kDepthBlock / 4;

// How vectors come from a panel. For each four `kPanelRows` are read and `kVectors` made, the last registers, in the
// order of places.
template <class Form>
struct PanelCode;

template <>
struct PanelCode<SingleValues> {
    static constexpr MultiplyAdd kKind = kAddSingles;
    static constexpr int kPanelRows = 4, kVectors = 4, kBytes = 4 * Avx512Encoder::kAccessBytes;

    static void begin(Avx512Encoder&) {}
    static void make_vectors(Avx512Encoder& code, int row, std::int32_t width) {
        for (int i = 0; i < kVectors; ++i) code.load(32 - kVectors + i, Address::first, (row + i) * width);
    }
    template <class T>
    static void make_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, float* panel, float*) {
        fill_panel(job, lanes, block, panel);
    }
};

// A panel has the pairs of the first two places and of the last two; the other four are made of these.
template <>
struct PanelCode<PairedValues> {
    static constexpr MultiplyAdd kKind = kAddPairs;
    static constexpr int kPanelRows = 2, kVectors = kPairs;
    static constexpr int kBytes =
        2 * Avx512Encoder::kAccessBytes + 2 * Avx512Encoder::kShiftBytes + 4 * Avx512Encoder::kBlendBytes;

    static void begin(Avx512Encoder& code) { code.begin_blends(); }
    static void make_vectors(Avx512Encoder& code, int row, std::int32_t width) {
        constexpr int p01 = 26, p02 = 27, p03 = 28, p12 = 29, p13 = 30, p23 = 31, second = 24, third = 25;
        code.load(p01, Address::first, row * width);
        code.load(p23, Address::first, (row + 1) * width);
        code.shift_down(second, p01);
        code.shift_up(third, p23);
        code.blend(p02, p01, third);
        code.blend(p03, p01, p23);
        code.blend(p12, second, third);
        code.blend(p13, second, p23);
    }
    template <class T>
    static void make_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, float* panel, float* floats) {
        const Index count = fill_panel(job, lanes, block, floats), width = lanes.width;
        for (Index k = 0; k < count; k += 2, floats += 2 * width, panel += width) {
            for (Index lane = 0; lane < width; lane += kFloats) {
                PairedValues::join_rows(floats + lane, floats + width + lane, panel + lane);
            }
        }
    }
};

// Code is written into one copy after the other. The oldest has left the cache of instructions; a processor that is told
// to change an instruction in that cache stops and starts afresh, for each line.
template <class Form>
class RowCode {
   public:
    using Panel = PanelCode<Form>;
    using Function = void (*)(const float* panel, const float* near, float* sums, const float* far, int adds, Index step);
    static constexpr Index kPanelRows = kCodeBlocks * kFours * Panel::kPanelRows;

    // Code for some rows, until as many others are written as there are copies.
    struct Written {
        Function function;
        Index stride;

        // Adds to the sums of these rows for one vector of lanes, from zero where they are the first.
        void run(const float* panel, const float* values, float* sums, bool first) const {
            constexpr Index kMiddle = kNear * Form::kValues / 2;  // as offsets of one byte reach to both sides
            function(panel, values + kMiddle, sums, values + 3 * kMiddle, !first, stride);
        }
    };

    static bool is_allowed() {
        static const bool allowed = ExecutableMemory(kBytes).data() != nullptr;
        return allowed;
    }

    bool is_ready() const { return memory_.data() != nullptr; }

    // Writes code for what `rows` keep of `fours`, from block to block of depth at a distance of `stride` values.
    // `width` is that of panels and sums. Best done one turn before it runs: meanwhile it leaves the cache of data.
    Written write(Index rows, Index fours, Index width, const std::uint8_t* places, Index stride) {
        const Shape shape{static_cast<int>(rows), static_cast<int>(fours), static_cast<std::int32_t>(width)};
        Copies& copies = kinds_[2 * (rows == kCodeRows) + (fours == kCodeBlocks * kFours)];
        Program& program = copies.programs[copies.next++ % kCodeCopies];
        if (!(program.shape == shape)) {
            const auto place = (&copies - kinds_) * kCodeCopies + (&program - copies.programs);
            program.shape = shape;
            emit(program, memory_.data() + kProgramBytes * place);
        }
        set_places(program, places, stride);
        return {program.function, static_cast<Index>(stride * sizeof(float))};
    }

   private:
    using Encoder = Avx512Encoder;

    static constexpr int kEach = Form::kValues / kFours;  // values of a row and a four
    static constexpr int kNear = 8;                       // rows whose values one register reaches
    static constexpr Address kAddresses[] = {Address::second, Address::fourth, Address::other};
    static_assert(kCodeRows == kNear * static_cast<int>(std::size(kAddresses)));
    static constexpr std::size_t kProgramBytes = 16384, kBytes = 4 * kCodeCopies * kProgramBytes;
    static_assert(kCodeBlocks * kFours * (Panel::kBytes + kCodeRows * kEach * Encoder::kMultiplyAddBytes) +
                      kCodeRows * 3 * Encoder::kAccessBytes + 64 <= kProgramBytes);

    struct Shape {
        int rows = 0, fours = 0;
        std::int32_t width = 0;
        bool operator==(const Shape&) const = default;
    };
    struct Program {
        Shape shape;
        Function function = nullptr;
        std::uint8_t* fours = nullptr;
    };
    struct Copies {
        Program programs[kCodeCopies];
        unsigned next = 0;
    };

    static void emit(Program& program, std::uint8_t* to) {
        const auto [rows, fours, lanes] = program.shape;
        const auto width = static_cast<std::int32_t>(lanes * sizeof(float));
        program.function = reinterpret_cast<Function>(to);
        Encoder code(to);
        Panel::begin(code);
        code.set_other(Address::fourth, kNear * Form::kValues * sizeof(float));
        for (int row = 0; row < rows; ++row) code.clear(row);
        code.skip_unless_fifth(rows * Encoder::kAccessBytes);
        for (int row = 0; row < rows; ++row) code.load(row, Address::third, row * width);
        program.fours = code.at();
        for (int four = 0; four < fours; ++four) {
            if (four > 0 && four % kFours == 0) advance(code);
            Panel::make_vectors(code, four * Panel::kPanelRows, width);
            for (int row = 0; row < rows; ++row) add_row(code, row, four % kFours);
        }
        for (int row = 0; row < rows; ++row) code.store(row, Address::third, row * width);
        code.leave();
    }

    static void advance(Encoder& code) {
        for (const Address address : kAddresses) code.add_sixth(address);
    }

    static void add_row(Encoder& code, int row, int four) {
        const int value = (row % kNear - kNear / 2) * static_cast<int>(Form::kValues) + four * kEach;
        for (int i = 0; i < kEach; ++i) code.multiply_add(Panel::kKind, row, kFirst, kAddresses[row / kNear], value + i);
    }

    // The bytes of all values at once; then each goes to its place.
    static void set_places(const Program& program, const std::uint8_t* places, Index stride) {
        const auto [rows, fours, width] = program.shape;
        std::uint8_t* at = program.fours + Encoder::kVectorByte;
        alignas(64) std::uint8_t bytes[kCodeRows * Form::kValues];
        for (int four = 0; four < fours; ++four) {
            if (four % kFours == 0) bytes_of(places + four / kFours * stride, rows, bytes);
            if (four > 0 && four % kFours == 0) at += std::size(kAddresses) * Encoder::kAddBytes;
            at += Panel::kBytes;
            const std::uint8_t* from = bytes + four % kFours * kEach;
            for (int row = 0; row < rows; ++row, from += Form::kValues) {
                for (int i = 0; i < kEach; ++i, at += Encoder::kMultiplyAddBytes) *at = from[i];
            }
        }
    }

    static void bytes_of(const std::uint8_t* places, int rows, std::uint8_t* to) {
        // Places go on from four to four, registers do not; a register one higher is a byte that is `kStep` lower.
        using Bytes = Vector<std::uint8_t, Form::kValues>;
        constexpr std::uint8_t kLowest = Encoder::vector_byte(Panel::kKind, kFirst);
        constexpr std::uint8_t kStep = kLowest - Encoder::vector_byte(Panel::kKind, kFirst + 1);
        Bytes first;
        for (int i = 0; i < Form::kValues; ++i) first[i] = kLowest + kStep * (i / kEach * Panel::kVectors);
        for (Index i = 0; i < rows * Form::kValues; i += Form::kValues) {
            store(first - load<Bytes>(places + i) * kStep, to + i);
        }
    }

    static constexpr int kFirst = 32 - Panel::kVectors;

    ExecutableMemory memory_{kBytes};
    Copies kinds_[4];  // for full depth and rest, and for all rows and rest
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
