// The steps of a network in integers as compiled for each instruction set (see network_isa.cpp).
#pragma once

#include <cstdint>

#include "machine/instruction_sets.h"
#include "network/image.h"
#include "network/integer_layer.h"
#include "network/scaling.h"

namespace nmcompile {

constexpr int kCodes = 256;
constexpr std::int64_t kTilePixels = 26;       // as many sums as leave registers for decoding
constexpr std::int64_t kSlack = 64;            // bytes that kernels may read or write behind an image or a row
constexpr std::int64_t kRowsOfATask = 2048;    // bytes, about, of a step that only maps codes

// What becomes of codes after they are computed.
struct Finish {
    const std::uint8_t* table;  // kCodes of them, or null
    bool prunes;                // keeps the four largest of eight channels; of equal codes the first
};

struct LayerJob {
    const IntegerLayer* layer;
    const std::uint8_t* input;  // the arena
    Image from;
    std::int64_t pad_y, pad_x;
    Affine affine;
    std::int64_t height, width;  // of the result
    // Codes are clamp(round(y / step), low, high) - low of the grid, or floats are samples x outs x height x width,
    // unless `last`.
    std::uint8_t* output;  // the arena, or null
    Image to;
    Grid grid;
    const Scaling* scaling;
    Finish finish;
    float* floats;  // or null
    bool last;      // floats are samples x height x width x outs

    std::int64_t pixels() const { return from.samples * height * width; }
};

struct Extent {
    std::int64_t pixel, pixels, line, lines;  // lines are blocks of kOuts out-channels
};

constexpr std::int64_t kEncoded = 64;  // pixels at a time

// Codes of floats: clamp(round(x / step), low, high) - low.
struct EncodeJob {
    const float* x;  // samples x channels x height x width
    bool last;       // or samples x height x width x channels
    std::uint8_t* output;
    Image to;
    float step;
    std::int32_t low, high;
    bool exact;   // refuses what is not on the grid
    bool prunes;  // keeps the four largest of eight channels, as `Finish` does
};

struct PoolJob {
    const std::uint8_t* input;
    Image from;
    std::uint8_t* output;
    Image to;
    Window window;
    std::int64_t pad_y, pad_x;
};

struct Kernels {
    std::int64_t tile_pixels[3];  // by form
    // Computes an extent of the pixels and out-channels; `scratch` holds `tile_pixels` rows of depth and slack.
    void (*layer)(const LayerJob&, const Extent&, std::uint8_t* scratch);
    // Writes up to kEncoded pixels of a sample; returns whether none is a NaN and, if `exact`, all are on the grid.
    bool (*encode)(const EncodeJob&, std::int64_t sample, std::int64_t first);
    void (*finish)(std::uint8_t* codes, std::int64_t count, const Finish&);
    // Writes clamp(a + b + offset, low, high).
    void (*add)(const std::uint8_t* a, const std::uint8_t* b, std::int64_t count, int offset, int low, int high,
                std::uint8_t* sums);
    // Computes a row of pixels of a sample.
    void (*pool)(const PoolJob&, std::int64_t sample, std::int64_t y);
};

namespace baseline {
extern const Kernels network_kernels;
}
#if defined(__x86_64__)
namespace v3 {
extern const Kernels network_kernels;
}
namespace vnni {  // AVX-512 with VNNI and VBMI
extern const Kernels network_kernels;
}
#endif

// Returns the kernels of the best instructions that come with a set on this machine.
const Kernels& network_kernels(InstructionSet isa);

}  // namespace nmcompile
