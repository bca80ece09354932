// Machine code for some rows of the sparse operand, written anew for every few blocks of depth.
//
// A compiled loop finds a value's row of the panel by its address, so that every multiply-add reads a vector from a
// cache: more than processors sustain. Written code names a register: the rows of a group of depth are loaded once for 24
// rows of S, and what a multiply-add reads is one float, the value. From block to block only the bytes differ that name
// these registers.
#pragma once

#include <iterator>

#include "gemm/avx512_encoder.h"
#include "gemm/paired_values.h"
#include "machine/executable_memory.h"

#if defined(__AVX512F__)
namespace nmcompile::NMCOMPILE_ISA {

constexpr int kCodeRows = 24;     // of S: their sums stay in registers
constexpr int kCodeBlocks = 2;    // of depth
constexpr int kCodeLanes = 768;   // of a tile: what is new takes about as long to fetch as to run for 16 of them
constexpr int kCodeCopies = 12;   // together they are larger than a first-level cache of instructions

// How vectors come from a panel. For each group of `kDepth` elements of depth, `kPanelRows` are read and `kVectors` made,
// the last registers, in the order of places. A row of S keeps `kEach` values of a group.
template <class Form>
struct PanelCode;

template <>
struct PanelCode<SingleValues> {
    static constexpr MultiplyAdd kKind = kAddSingles;
    static constexpr int kDepth = 8, kEach = 4, kPanelRows = 8, kVectors = 8, kBytes = 8 * Avx512Encoder::kAccessBytes;

    static void begin(Avx512Encoder&) {}
    static void make_vectors(Avx512Encoder& code, int row, std::int32_t width) {
        for (int i = 0; i < kVectors; ++i) code.load(32 - kVectors + i, Address::first, (row + i) * width);
    }
    // Names the vectors of a row's places in its multiply-adds, all at once: in each, three bits are the number of a
    // vector, inverted.
    static void name_vectors(std::uint8_t* code, const std::uint8_t* places, int) {
        constexpr int kAt = 8 * Avx512Encoder::kVectorByte + 3, kInverts = 0x72;  // b inverted where c is set, else a
        static_assert(Avx512Encoder::kMultiplyAddBytes == sizeof(std::uint64_t) && kVectors == 8);
        auto* const all = reinterpret_cast<__m256i*>(code);
        const __m256i number = _mm256_slli_epi64(_mm256_cvtepu8_epi64(_mm_loadu_si32(places)), kAt);
        const __m256i bits = _mm256_set1_epi64x((kVectors - 1) << kAt);
        _mm256_storeu_si256(all, _mm256_ternarylogic_epi64(_mm256_loadu_si256(all), number, bits, kInverts));
    }
    template <class T>
    static void make_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, const Strides& to, float* panel,
                           float*) {
        fill_panel(job, lanes, block, to, panel);
    }
};

// A panel has the pairs of the first two places and of the last two; the other four are made of these.
template <>
struct PanelCode<PairedValues> {
    static constexpr MultiplyAdd kKind = kAddPairs;
    static constexpr int kDepth = 4, kEach = 1, kPanelRows = 2, kVectors = kPairs;
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
    // Places go on from group to group, registers do not.
    static void name_vectors(std::uint8_t* code, const std::uint8_t* places, int group) {
        code[Avx512Encoder::kVectorByte] = Avx512Encoder::vector_byte(kKind, 32 - kVectors + *places - group * kVectors);
    }
    template <class T>
    static void make_panel(const GemmJob<T>& job, const PanelLanes& lanes, Index block, const Strides& to, float* panel,
                           float* floats) {
        const Index count = fill_panel(job, lanes, block, Strides::side_by_side(lanes.width), floats);
        for (Index k = 0; k < count; k += 2, floats += 2 * lanes.width, panel += to.row) {
            for (Index lane = 0; lane < lanes.width; lane += kFloats) {
                PairedValues::join_rows(floats + lane, floats + lanes.width + lane, panel + to.of_lane(lane));
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
    static constexpr int kGroups = kDepthBlock / Panel::kDepth;       // of a block
    static constexpr Index kBlockRows = kGroups * Panel::kPanelRows;  // of a panel, for a block
    static constexpr Index kPanelRows = kCodeBlocks * kBlockRows;

    // Code for some rows, until as many others are written as there are copies. It runs once all its groups are written.
    struct Written {
        Function function;
        std::uint8_t* at;
        const std::uint8_t* places;
        Index stride;
        int rows, group, groups;

        bool is_complete() const { return group == groups; }

        // Writes the places of all rows in the next group of depth.
        void write_group() {
            if (group > 0 && group % kGroups == 0) at += std::size(kAddresses) * Encoder::kAddBytes;
            at += Panel::kBytes;
            const std::uint8_t* from = places + group / kGroups * stride + group % kGroups * Panel::kEach;
            for (int row = 0; row < rows; ++row, from += Form::kValues) {
                Panel::name_vectors(at, from, group % kGroups);
                at += Panel::kEach * Encoder::kMultiplyAddBytes;
            }
            ++group;
        }

        // Adds to the sums of these rows for one vector of lanes, from zero where they are the first.
        void run(const float* panel, const float* values, float* sums, bool first) const {
            constexpr Index kMiddle = kNear * Form::kValues / 2;  // as offsets of one byte reach to both sides
            const auto step = static_cast<Index>(stride * sizeof(float));
            function(panel, values + kMiddle, sums, values + 3 * kMiddle, !first, step);
        }
    };

    static bool is_allowed() {
        static const bool allowed = ExecutableMemory(kBytes).data() != nullptr;
        return allowed;
    }

    bool is_ready() const { return memory_.data() != nullptr; }

    // Begins code for what `rows` keep of `depth` elements, from block to block of them at a distance of `stride` values.
    // `width` is the distance between rows of panels and of sums.
    Written begin(Index rows, Index depth, Index width, const std::uint8_t* places, Index stride) {
        const auto groups = static_cast<int>(pieces(depth, Panel::kDepth));
        const Shape shape{static_cast<int>(rows), groups, static_cast<std::int32_t>(width)};
        Copies& copies = kinds_[2 * (rows == kCodeRows) + (groups == kCodeBlocks * kGroups)];
        Program& program = copies.programs[copies.next++ % kCodeCopies];
        if (!(program.shape == shape)) {
            const auto place = (&copies - kinds_) * kCodeCopies + (&program - copies.programs);
            program.shape = shape;
            emit(program, memory_.data() + kProgramBytes * place);
        }
        return {program.function, program.groups, places, stride, shape.rows, 0, groups};
    }

   private:
    using Encoder = Avx512Encoder;

    static constexpr int kNear = 8;  // rows whose values one register reaches
    static constexpr Address kAddresses[] = {Address::second, Address::fourth, Address::other};
    static_assert(kCodeRows == kNear * static_cast<int>(std::size(kAddresses)));
    static constexpr std::size_t kProgramBytes = 16384, kBytes = 4 * kCodeCopies * kProgramBytes;
    static_assert(kCodeBlocks * kGroups * (Panel::kBytes + kCodeRows * Panel::kEach * Encoder::kMultiplyAddBytes) +
                      kCodeRows * 3 * Encoder::kAccessBytes + 64 <= kProgramBytes);

    struct Shape {
        int rows = 0, groups = 0;
        std::int32_t width = 0;
        bool operator==(const Shape&) const = default;
    };
    struct Program {
        Shape shape;
        Function function = nullptr;
        std::uint8_t* groups = nullptr;
    };
    struct Copies {
        Program programs[kCodeCopies];
        unsigned next = 0;
    };

    static void emit(Program& program, std::uint8_t* to) {
        const auto [rows, groups, lanes] = program.shape;
        const auto width = static_cast<std::int32_t>(lanes * sizeof(float));
        program.function = reinterpret_cast<Function>(to);
        Encoder code(to);
        Panel::begin(code);
        code.set_other(Address::fourth, kNear * Form::kValues * sizeof(float));
        for (int row = 0; row < rows; ++row) code.clear(row);
        code.skip_unless_fifth(rows * Encoder::kAccessBytes);
        for (int row = 0; row < rows; ++row) code.load(row, Address::third, row * width);
        program.groups = code.at();
        for (int group = 0; group < groups; ++group) {
            if (group > 0 && group % kGroups == 0) advance(code);
            Panel::make_vectors(code, group * Panel::kPanelRows, width);
            for (int row = 0; row < rows; ++row) add_row(code, row, group % kGroups);
        }
        for (int row = 0; row < rows; ++row) code.store(row, Address::third, row * width);
        code.leave();
    }

    static void advance(Encoder& code) {
        for (const Address address : kAddresses) code.add_sixth(address);
    }

    static void add_row(Encoder& code, int row, int group) {
        const int value = (row % kNear - kNear / 2) * static_cast<int>(Form::kValues) + group * Panel::kEach;
        for (int i = 0; i < Panel::kEach; ++i) {
            code.multiply_add(Panel::kKind, row, kFirst, kAddresses[row / kNear], value + i);
        }
    }

    static constexpr int kFirst = 32 - Panel::kVectors;

    ExecutableMemory memory_{kBytes};
    Copies kinds_[4];  // for full depth and rest, and for all rows and rest
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
