// Codes of products by the scaling of the layer, from sums in registers.
#pragma once

#include "network/epilogue.h"
#include "network/products.h"

#if defined(__AVX2__)
namespace nmcompile::NMCOMPILE_ISA {

// Writes the codes of up to kOuts out-channels from `out` on; `to` is each pixel's first code.
struct StoreCodes {
    const LayerJob& job;
    Index out, count, pixels;
    std::uint8_t* const* to;
    std::uint32_t unsure = 0;  // a bit for each four pixels of which the scaling does not decide all

    template <int kFirst, int kSecond, int kPixels>
    void take(int part, const Sums (&sums)[kPixels]) {
        const Index channel = out + part * kOutsOfPart, rest = count - part * kOutsOfPart;
        if (rest <= 0) return;
        const auto scale = load<Floats>(job.scaling->scale.data() + channel);
        const auto offset = load<Floats>(job.scaling->offset.data() + channel);
        const Floats scales[] = {scale * (1.0f / kFirst), scale * (1.0f / kSecond)};
        FixedPoint fixed(job);
        const auto four = [&]<int kFour, int... I>(std::integral_constant<int, kFour>, std::integer_sequence<int, I...>) {
            constexpr auto within = [](int p) { return p < kPixels ? p : kFour; };
            FourIntegers found{{fixed.of(sums[within(kFour + I)], scales[within(kFour + I) % 2], offset)...}};
            unsure |= std::uint32_t{!fixed.decides(found)} << (kFour / 4);
            struct Parts {
                FewBytes of[4];
            };
            const auto codes = std::bit_cast<Parts>(fixed.clamped(upper_bytes(found)));
            (store_pixel<kFour + I, kPixels>(codes.of[I], channel, rest), ...);
        };
        [&]<int... kFours>(std::integer_sequence<int, kFours...>) {
            (four(std::integral_constant<int, 4 * kFours>{}, std::make_integer_sequence<int, 4>{}), ...);
        }(std::make_integer_sequence<int, (kPixels + 3) / 4>{});
    }

private:
    template <int kPixel, int kPixels>
    void store_pixel(FewBytes codes, Index channel, Index rest) const {
        if constexpr (kPixel < kPixels) {
            // The second of the last two pixels may be none.
            if (kPixel < kPixels - 1 || kPixel < pixels) store_some(codes, rest, to[kPixel] + channel);
        }
    }
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
