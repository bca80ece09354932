// The integers of a convolution, or of a linear layer as a convolution of one pixel, packed for the kernels:
//
//     N[pixel, out] = sum over (tap, in) of Q[out, tap, in] * K[pixel, tap, in]
//
// Depth runs over taps and the in-channels of a group, in the order of an image's bytes. There are three forms:
//
//     sparse     at most two of each four integers along the depth are not zero, integers of 4 bits, codes of 4 bits.
//                For sixteen out-channels and eight of depth, 64 bytes; byte 4 o + i belongs to out-channel o and to its
//                i-th kept integer: the place in the eight in the lower three bits, the integer in the upper four.
//     dense      integers of 8 bits, codes of 8 bits. For sixteen out-channels and four of depth, 64 bytes: 4 o + depth.
//     depthwise  one in-channel for each out-channel: taps x channels.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/aligned_memory.h"

namespace nmcompile {

enum class Form { sparse, dense, depthwise };
constexpr const char* kFormNames[] = {"sparse", "dense", "depthwise"};

constexpr std::int64_t kOuts = 16;                 // out-channels of a block
constexpr std::int64_t kBlock = 64;                // bytes of a block
constexpr std::int64_t kDepthOf[] = {8, 4, 1};     // depth of a block, by form
constexpr std::int64_t kMostIntegers = 1 << 16;    // depth with which no sum of products of bytes overflows 32 bits
constexpr int kMostSparseCode = 15;

struct Window {
    std::int64_t height, width, stride_y, stride_x, dilation_y, dilation_x;
    std::int64_t taps() const { return height * width; }
};

class IntegerLayer {
public:
    // Packs out x height x width x in/groups. Codes are at most `most`.
    IntegerLayer(const std::int8_t* weights, std::int64_t outs, std::int64_t ins, std::int64_t groups, Window window,
                 int most);

    Form form() const { return form_; }
    const Window& window() const { return window_; }
    std::int64_t outs() const { return outs_; }
    std::int64_t channels() const { return ins_ * groups_; }
    std::int64_t groups() const { return groups_; }
    std::int64_t group_ins() const { return ins_; }
    std::int64_t group_outs() const { return form_ == Form::depthwise ? outs_ : outs_ / groups_; }
    std::int64_t depth() const { return window_.taps() * ins_; }
    std::int64_t blocks() const;        // blocks along the depth
    std::int64_t group_lines() const;   // blocks along the out-channels of a group; of all, if it is depthwise
    std::int64_t lines() const { return form_ == Form::depthwise ? group_lines() : groups_ * group_lines(); }
    std::int64_t bytes() const { return static_cast<std::int64_t>(packed_.count()); }
    const std::uint8_t* packed() const { return packed_.data(); }
    int most() const { return most_; }  // the largest code
    const std::int32_t* sums() const { return sums_.data(); }  // of each out-channel's integers, and kBlock zeros
    const std::int32_t* magnitudes() const { return magnitudes_.data(); }  // sums of them

private:
    void pack(const std::int8_t* weights);

    Form form_;
    Window window_;
    std::int64_t outs_, ins_, groups_;
    int most_;
    std::vector<std::int32_t> sums_, magnitudes_;
    AlignedMemory<std::uint8_t> packed_;
};

}  // namespace nmcompile
