// Codes of a depthwise window by the scaling of the layer: sums and factors stay in registers, in the order of
// `side_by_side`, which narrowing to bytes undoes.
#pragma once

#include "network/code_maps.h"
#include "network/depthwise.h"
#include "network/fixed_point.h"

#if defined(__AVX512VNNI__)
namespace nmcompile::NMCOMPILE_ISA {

// A window of three by three. Neighbours in a row share columns, which are kept.
class ThreeByThree {
public:
    static bool is_for(const Window& window) { return window.height == 3 && window.width == 3; }

    ThreeByThree(const LayerJob& job, std::int64_t channel)
        : channel_(channel),
          down_(job.layer->window().dilation_y * job.from.row()),
          right_(job.layer->window().dilation_x * job.from.stride),
          step_(job.layer->window().stride_x * job.from.stride) {
        const std::uint8_t* integers = job.layer->packed() + channel;
        for (int x = 0; x < 3; ++x, integers += job.layer->outs()) {
            weights_[x] = side_by_side(rows(integers, 3 * job.layer->outs(), _mm512_setzero_si512()));
        }
    }

    // Returns the sums of a pixel, added to others; calls come in the order of pixels.
    Four sums(const std::uint8_t* input, Four all) {
        const std::uint8_t* const first = input + channel_;
        const bool is_next = first == next_;
        if (is_next && step_ == right_) {
            columns_[0] = columns_[1];
            columns_[1] = columns_[2];
        } else {
            columns_[0] = is_next && step_ == 2 * right_ ? columns_[2] : column(first);
            columns_[1] = column(first + right_);
        }
        columns_[2] = column(first + 2 * right_);
        next_ = first + step_;
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) all.of[i] = _mm512_dpbusd_epi32(all.of[i], columns_[x].of[i], weights_[x].of[i]);
        }
        return all;
    }

private:
    static Four rows(const std::uint8_t* from, std::int64_t row, __m512i fourth) {
        return {{_mm512_loadu_si512(from), _mm512_loadu_si512(from + row), _mm512_loadu_si512(from + 2 * row), fourth}};
    }

    // The fourth row has integers of zero, so any code will do.
    Four column(const std::uint8_t* from) const {
        return side_by_side(rows(from, down_, _mm512_loadu_si512(from + 2 * down_)));
    }

    std::int64_t channel_, down_, right_, step_;
    const std::uint8_t* next_ = nullptr;
    Four weights_[3], columns_[3];
};

// Returns 32 bits of each of kChunk channels.
inline Four side_by_side(const void* channels) {
    const auto* const all = static_cast<const float*>(channels);
    const auto lane = [&](int i, int lane) { return _mm_loadu_ps(all + 16 * lane + 4 * i); };
    Four found;
    for (int i = 0; i < 4; ++i) {
        const __m512 first = _mm512_insertf32x4(_mm512_castps128_ps512(lane(i, 0)), lane(i, 1), 1);
        const __m512 second = _mm512_insertf32x4(_mm512_insertf32x4(first, lane(i, 2), 2), lane(i, 3), 3);
        found.of[i] = _mm512_castps_si512(second);
    }
    return found;
}

inline ManyBytes channels_in_order(ManyBytes codes) {
    const __m512i order = _mm512_set4_epi32(0x0F0D0B09, 0x0E0C0A08, 0x07050301, 0x06040200);
    return std::bit_cast<ManyBytes>(_mm512_shuffle_epi8(std::bit_cast<__m512i>(codes), order));
}

// Writes the codes of up to kChunk channels, and by `exact` those of a pixel that the scaling does not decide. The layer
// has no more taps than `Taps` takes.
template <class Exact>
inline void write_depthwise_codes(const LayerJob& job, std::int64_t channel, std::int64_t count, std::int64_t pixels,
                                  const std::uint8_t* const* inputs, std::uint8_t* const* to, const Exact& exact) {
    const auto scale = std::bit_cast<FourFloats>(side_by_side(job.scaling->scale.data() + channel));
    const auto offset = std::bit_cast<FourFloats>(side_by_side(job.scaling->offset.data() + channel));
    Four start = side_by_side(job.affine.sums + channel);
    for (__m512i& one : start.of) one = _mm512_mullo_epi32(one, _mm512_set1_epi32(-job.affine.zero));
    const auto write = [&](auto window) {
        FixedPoint fixed(job);
        for (std::int64_t p = 0; p < pixels; ++p) {
            const Four sums = window.sums(inputs[p], start);
            FourIntegers found;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                found.of[i] = fixed.of(std::bit_cast<Integers>(sums.of[i]), scale.of[i], offset.of[i]);
            }
            const bool is_sure = fixed.decides(found);
            store_some(fixed.clamped(channels_in_order(upper_bytes_in_turns(found))), count, to[p] + channel);
            if (!is_sure) exact(p);
        }
    };
    if (ThreeByThree::is_for(job.layer->window())) return write(ThreeByThree(job, channel));
    with_columns(Taps(job, 0), channel, write);
}

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
