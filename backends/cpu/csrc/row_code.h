// Machine code for some rows of the sparse operand, written anew for each block of depth.
//
// A compiled loop finds a value's row of the panel by its address, so that every multiply-add reads a vector from a
// cache: more than processors sustain. Written code names a register: four rows of a panel are loaded once for sixteen
// rows of S, and what a multiply-add reads is one float, the value. Between blocks only the bytes that name these
// registers differ.
#pragma once

#include "avx512_encoder.h"
#include "executable_memory.h"
#include "kept_values.h"
#include "paired_values.h"

#if defined(__AVX512F__)
namespace nmcompile::NMCOMPILE_ISA {

constexpr int kCodeRows = 16;   // of S: their sums stay in registers
constexpr int kCodePanels = 8;  // that code is written for: writing it takes about as long as running it once

template <class Form>
inline constexpr MultiplyAdd kMultiplyAdd{};
template <>
inline constexpr MultiplyAdd kMultiplyAdd<SingleValues> = kAddSingles;
template <>
inline constexpr MultiplyAdd kMultiplyAdd<PairedValues> = kAddPairs;

// Form: what values are and which rows of a panel belong to a four (see SingleValues in kept_values.h).
template <class Form>
class RowCode {
   public:
    static bool is_allowed() {
        static const bool allowed = ExecutableMemory(kBytes).data() != nullptr;
        return allowed;
    }

    bool is_ready() const { return memory_.data() != nullptr; }

    // Makes it the code for the next `rows` of S and a block with `fours`; `width` is that of panels and sums.
    void write(int rows, int fours, Index width, const std::uint8_t* places) {
        const Shape shape{rows, fours, width};
        Program& program = programs_[2 * (rows == kCodeRows) + (fours == kFours)];
        if (!(program.shape == shape)) {
            program.shape = shape;
            emit(program, memory_.data() + kProgramBytes * (&program - programs_));
        }
        set_places(program, places);
        written_ = &program;
    }

    // Adds the products of one vector of lanes to the sums of the rows that were written for, or stores the first.
    void run(const float* panel, const float* values, float* sums, bool first) const {
        constexpr Index kMiddle = kNear * Form::kValues / 2;  // as offsets of one byte reach to both sides
        (first ? written_->first : written_->next)(panel, values + kMiddle, sums, values + 3 * kMiddle);
    }

   private:
    using Entry = void (*)(const float* panel, const float* near, float* sums, const float* far);
    using Encoder = Avx512Encoder;

    static constexpr int kFours = kDepthBlock / 4;
    static constexpr int kEach = Form::kValues / kFours;           // values of a row and a four
    static constexpr int kPanelRows = Form::kPanelRows / kFours;   // of a four
    static constexpr int kFirstVector = 32 - kPanelRows;
    static constexpr int kNear = kCodeRows / 2;  // rows whose values one register reaches
    static constexpr std::size_t kProgramBytes = 8192, kBytes = 4 * kProgramBytes;
    static_assert(kFours * (kPanelRows * Encoder::kLoadBytes + kCodeRows * kEach * Encoder::kMultiplyAddBytes) +
                      kCodeRows * 3 * Encoder::kLoadBytes + 16 <= kProgramBytes);

    struct Shape {
        int rows = 0, fours = 0;
        Index width = 0;
        bool operator==(const Shape&) const = default;
    };
    // Full blocks and rest, full sixteens of rows and rest: there is one program for each.
    struct Program {
        Shape shape;
        Entry first = nullptr, next = nullptr;
        std::uint8_t* fours = nullptr;
    };

    static Entry entry(std::uint8_t* code) { return reinterpret_cast<Entry>(code); }

    static void emit(Program& program, std::uint8_t* to) {
        const Shape& shape = program.shape;
        const auto bytes = static_cast<std::int32_t>(shape.width * sizeof(float));
        Encoder code(to);
        program.first = entry(code.at());
        for (int row = 0; row < shape.rows; ++row) code.clear(row);
        std::uint8_t* const jump = code.jump();
        program.next = entry(code.at());
        for (int row = 0; row < shape.rows; ++row) code.load(row, Argument::third, row * bytes);
        code.land(jump);
        program.fours = code.at();
        for (int four = 0; four < shape.fours; ++four) emit_four(code, shape.rows, four, bytes);
        for (int row = 0; row < shape.rows; ++row) code.store(row, Argument::third, row * bytes);
        code.leave();
    }

    static void emit_four(Encoder& code, int rows, int four, std::int32_t bytes) {
        for (int i = 0; i < kPanelRows; ++i) {
            code.load(kFirstVector + i, Argument::first, (four * kPanelRows + i) * bytes);
        }
        for (int row = 0; row < rows; ++row) {
            const Argument address = row < kNear ? Argument::second : Argument::fourth;
            const int value = (row % kNear - kNear / 2) * static_cast<int>(Form::kValues) + four * kEach;
            for (int i = 0; i < kEach; ++i) code.multiply_add(kMultiplyAdd<Form>, row, kFirstVector, address, value + i);
        }
    }

    static void set_places(const Program& program, const std::uint8_t* places) {
        // As places go up, the byte goes down (the register is in it inverted).
        constexpr int kStep = Encoder::vector_byte(kMultiplyAdd<Form>, 31) - Encoder::vector_byte(kMultiplyAdd<Form>, 30);
        std::uint8_t* at = program.fours + Encoder::kVectorByte;
        for (int four = 0; four < program.shape.fours; ++four, places += kEach) {
            const int base = Encoder::vector_byte(kMultiplyAdd<Form>, kFirstVector) - kStep * kPanelRows * four;
            at += kPanelRows * Encoder::kLoadBytes;
            for (int row = 0; row < program.shape.rows; ++row) {
                for (int i = 0; i < kEach; ++i, at += Encoder::kMultiplyAddBytes) {
                    *at = static_cast<std::uint8_t>(base + kStep * places[row * Form::kValues + i]);
                }
            }
        }
    }

    ExecutableMemory memory_{kBytes};
    Program programs_[4];
    const Program* written_ = nullptr;
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
