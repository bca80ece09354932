#include "network/integer_layer.h"

#include <algorithm>
#include <cstdlib>

#include "machine/parallel.h"

namespace nmcompile {
namespace {

// Returns whether at most two of each four integers are not zero, and all have four bits.
bool is_sparse(const std::int8_t* row, std::int64_t depth) {
    for (std::int64_t from = 0; from < depth; from += 4) {
        int kept = 0;
        for (std::int64_t k = from; k < std::min(depth, from + 4); ++k) {
            if (row[k] < -7 || row[k] > 7) return false;
            kept += row[k] != 0;
        }
        if (kept > 2) return false;
    }
    return true;
}

Form form_of(const std::int8_t* weights, std::int64_t outs, std::int64_t depth, std::int64_t ins, std::int64_t groups,
             int most) {
    if (ins == 1 && groups == outs && groups > 1) return Form::depthwise;
    bool sparse = most <= kMostSparseCode && depth >= 8;
    for (std::int64_t o = 0; o < outs && sparse; ++o) sparse = is_sparse(weights + o * depth, depth);
    return sparse ? Form::sparse : Form::dense;
}

// Packs eight of depth of one out-channel into its four bytes.
void pack_sparse(const std::int8_t* eight, std::int64_t count, std::uint8_t* bytes) {
    int kept[2] = {0, 0};
    for (std::int64_t k = 0; k < count; ++k) {
        if (eight[k] == 0) continue;
        bytes[k / 4 * 2 + kept[k / 4]++] = static_cast<std::uint8_t>(k | eight[k] * 16);
    }
}

void pack_dense(const std::int8_t* four, std::int64_t count, std::uint8_t* bytes) {
    for (std::int64_t k = 0; k < count; ++k) bytes[k] = static_cast<std::uint8_t>(four[k]);
}

std::int64_t packed_bytes(Form form, std::int64_t outs, std::int64_t groups, std::int64_t depth) {
    if (form == Form::depthwise) return depth * outs + kBlock;  // kernels read whole vectors
    return groups * pieces(outs / groups, kOuts) * pieces(depth, kDepthOf[static_cast<int>(form)]) * kBlock;
}

}  // namespace

IntegerLayer::IntegerLayer(const std::int8_t* weights, std::int64_t outs, std::int64_t ins, std::int64_t groups,
                           Window window, int most)
    : form_(form_of(weights, outs, window.taps() * ins, ins, groups, most)),
      window_(window),
      outs_(outs),
      ins_(ins),
      groups_(groups),
      most_(most),
      sums_(outs + kBlock),
      magnitudes_(outs),
      packed_(packed_bytes(form_, outs, groups, depth())) {
    for (std::int64_t o = 0; o < outs; ++o) {
        for (const std::int8_t* w = weights + o * depth(); w < weights + (o + 1) * depth(); ++w) {
            sums_[o] += *w;
            magnitudes_[o] += std::abs(*w);
        }
    }
    std::fill_n(packed_.data(), packed_.count(), std::uint8_t{0});
    pack(weights);
}

std::int64_t IntegerLayer::blocks() const { return pieces(depth(), kDepthOf[static_cast<int>(form_)]); }

std::int64_t IntegerLayer::group_lines() const { return pieces(group_outs(), kOuts); }

void IntegerLayer::pack(const std::int8_t* weights) {
    const std::int64_t step = kDepthOf[static_cast<int>(form_)];
    for (std::int64_t o = 0; o < outs_; ++o, weights += depth()) {
        const std::int64_t group = o / group_outs(), out = o % group_outs();
        std::uint8_t* block = packed_.data() + (group * group_lines() + out / kOuts) * blocks() * kBlock;
        for (std::int64_t from = 0; from < depth(); from += step, block += kBlock) {
            const std::int64_t count = std::min(step, depth() - from);
            if (form_ == Form::sparse) pack_sparse(weights + from, count, block + 4 * (out % kOuts));
            if (form_ == Form::dense) pack_dense(weights + from, count, block + 4 * (out % kOuts));
            if (form_ == Form::depthwise) packed_.data()[from * outs_ + o] = static_cast<std::uint8_t>(weights[from]);
        }
    }
}

}  // namespace nmcompile
