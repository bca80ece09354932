// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "network/network_isa.h"

#include "machine/lanes.h"
#include "network/code_maps.h"
#include "network/depthwise_codes.h"
#include "network/encode.h"
#include "network/epilogue.h"
#include "network/gather.h"
#include "network/product_codes.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

constexpr Index kMostPixels[] = {2 * kMostPairs, kMostDense, kTilePixels};

inline Index smaller(Index a, Index b) { return a < b ? a : b; }

// Where the results of an extent's pixels go.
struct Places {
    std::uint8_t* codes[kTilePixels];
    float* floats[kTilePixels];

    Places(const LayerJob& job, const Extent& extent) {
        const Index outs = job.layer->outs(), next = job.last ? outs : 1;  // from a pixel to the next
        for_runs(extent.pixel, extent.pixels, job.height, job.width, [&](auto number, auto count, auto n, auto y, auto x) {
            if (job.floats) {
                const Index pixel = extent.pixel + number, first = (n * outs * job.height + y) * job.width + x;
                float* const place = job.floats + (job.last ? pixel * outs : first);
                for (Index i = 0; i < count; ++i) floats[number + i] = place + i * next;
            } else {
                std::uint8_t* const first = job.output + job.to.at(n, y, x);
                for (Index i = 0; i < count; ++i) codes[number + i] = first + i * job.to.stride;
            }
        });
    }

    // Writes up to kOuts out-channels from `out` on of some pixels from `first` on.
    void write(const LayerJob& job, Index out, Index count, Index first, Index pixels,
               const std::int32_t (*sums)[kOuts]) const {
        if (job.floats || !FixedPoint::fits(job)) return write_exactly(job, out, count, first, pixels, sums);
        write_fixed_point_codes(job, out, count, pixels, sums, codes + first, [&](Index from, Index some) {
            write_exactly(job, out, count, first + from, some, sums + from);
        });
    }

    void write_exactly(const LayerJob& job, Index out, Index count, Index first, Index pixels,
                       const std::int32_t (*sums)[kOuts]) const {
        static constexpr decltype(&Places::write_all<true, true>) kinds[2][2] = {
            {&Places::write_all<false, false>, &Places::write_all<false, true>},
            {&Places::write_all<true, false>, &Places::write_all<true, true>}};
        const auto kind = kinds[job.affine.bias != nullptr][job.affine.gain != nullptr];
        (this->*kind)(job, out, count, first, pixels, sums);
    }

    template <bool kBias, bool kNorm>
    void write_all(const LayerJob& job, Index out, Index count, Index first, Index pixels,
                   const std::int32_t (*sums)[kOuts]) const {
        if (job.floats) {
            write_floats<kBias, kNorm>(job, out, count, pixels, sums, floats + first);
        } else {
            write_codes<kBias, kNorm>(job, out, count, pixels, sums, codes + first);
        }
    }

    void finish(const LayerJob& job, Index out, Index count, Index pixels) const {
        if (job.floats || !(job.finish.table || job.finish.prunes)) return;
        for (Index p = 0, next = 1; p < pixels; p = next++) {
            while (next < pixels && codes[next] == codes[next - 1] + count) ++next;  // no gap between their codes
            finish_codes(codes[p] + out, (next - p) * count, job.finish);
        }
    }
};

void gather_group(const LayerJob& job, const Extent& extent, Index group, Index stride, std::uint8_t* scratch) {
    const Gather gather(job, group);
    const std::uint8_t* firsts[kTilePixels + 1];
    gather.find(extent, firsts);
    if (job.layer->form() == Form::dense) {
        for (Index p = 0; p < extent.pixels; ++p) gather.pixel(firsts[p], scratch + p * stride);
        return;
    }
    firsts[extent.pixels] = firsts[extent.pixels - 1];  // a last one without a partner is its own
    for (Index p = 0; p < extent.pixels; p += 2) gather.pair(firsts[p], firsts[p + 1], scratch + p / 2 * stride);
}

// A block of out-channels of a layer for some pixels of a tile.
struct ProductLine {
    const LayerJob& job;
    const Places& places;
    const std::uint8_t* scratch;
    Index stride, number, out, count;

    void write(Index pixels) const {
#if defined(__AVX2__)
        if (!job.floats && FixedPoint::fits(job)) {
            StoreCodes codes{job, out, count, pixels, places.codes};
            compute(0, pixels, codes);
            for (; codes.unsure != 0; codes.unsure &= codes.unsure - 1) {
                const Index first = 4 * std::countr_zero(codes.unsure);
                write_sums(first, smaller(4, pixels - first));
            }
            return;
        }
#endif
        write_sums(0, pixels);
    }

private:
    void write_sums(Index first, Index pixels) const {
        std::int32_t sums[kTilePixels][kOuts];
        StoreSums taker{sums};
        compute(first, pixels, taker);
        places.write_exactly(job, out, count, first, pixels, sums);
    }

    template <class Taker>
    void compute(Index first, Index pixels, Taker& taker) const {
        const IntegerLayer& layer = *job.layer;
        const Index row = layer.form() == Form::sparse ? first / 2 : first;
        const std::uint8_t* const packed = layer.packed() + number * layer.blocks() * kBlock;
        const Start start{job.affine.sums + out, job.affine.zero};
        products(layer.form(), pixels, scratch + row * stride, stride, packed, layer.blocks(), start, taker,
                 std::make_integer_sequence<int, kMostDense>{});
    }
};

// Lines count on over the groups; the range of an extent lies in one group, or starts and ends with groups.
void products_layer(const LayerJob& job, const Extent& extent, const Places& places, std::uint8_t* scratch) {
    const IntegerLayer& layer = *job.layer;
    const Index lines = layer.group_lines(), stride = layer.blocks() * kDepthOf[static_cast<int>(layer.form())];
    for (Index number = extent.line; number < extent.line + extent.lines; ++number) {
        const Index group = number / lines, in_group = number % lines * kOuts;
        if (number == extent.line || in_group == 0) gather_group(job, extent, group, stride, scratch);
        const Index out = group * layer.group_outs() + in_group;
        const ProductLine line{job, places, scratch, stride, number, out, smaller(kOuts, layer.group_outs() - in_group)};
        line.write(extent.pixels);
    }
}

// A chunk of out-channels of a depthwise layer for some pixels of a tile.
struct DepthwiseChunk {
    const LayerJob& job;
    const Places& places;
    const std::uint8_t* const* inputs;  // what the first tap reads for each pixel
    Index out, count;

    void write(Index first, Index pixels) const {
        std::int32_t sums[kChunk / kOuts][kTilePixels][kOuts];
        depthwise_sums(job, out, pixels, inputs + first, sums);
        for (Index i = 0; i < count; i += kOuts) {
            places.write(job, out + i, smaller(kOuts, count - i), first, pixels, sums[i / kOuts]);
        }
    }
};

void depthwise_layer(const LayerJob& job, const Extent& extent, const Places& places) {
    const std::uint8_t* inputs[kTilePixels];
    Gather(job, 0).find(extent, inputs);
    const Index last = smaller((extent.line + extent.lines) * kOuts, job.layer->outs());
    for (Index out = extent.line * kOuts; out < last; out += kChunk) {
        const DepthwiseChunk chunk{job, places, inputs, out, smaller(kChunk, last - out)};
#if defined(__AVX512VNNI__)
        if (!job.floats && FixedPoint::fits(job) && job.layer->window().taps() <= Taps::kMost) {
            write_depthwise_codes(job, out, chunk.count, extent.pixels, inputs, places.codes,
                                  [&](Index pixel) { chunk.write(pixel, 1); });
            continue;
        }
#endif
        chunk.write(0, extent.pixels);
    }
}

// Returns the first out-channel of a line; of the line behind the last, how many there are.
Index out_of(const IntegerLayer& layer, Index line) {
    const Index lines = layer.group_lines();
    return line / lines * layer.group_outs() + smaller(line % lines * kOuts, layer.group_outs());
}

void layer(const LayerJob& job, const Extent& extent, std::uint8_t* scratch) {
    const Places places(job, extent);
    if (job.layer->form() == Form::depthwise) {
        depthwise_layer(job, extent, places);
    } else {
        products_layer(job, extent, places, scratch);
    }
    const Index first = out_of(*job.layer, extent.line), last = out_of(*job.layer, extent.line + extent.lines);
    places.finish(job, first, last - first, extent.pixels);
}

void add(const std::uint8_t* a, const std::uint8_t* b, std::int64_t count, int offset, int low, int high,
         std::uint8_t* sums) {
    const auto least = static_cast<std::int16_t>(low), most = static_cast<std::int16_t>(high);
    for (std::int64_t i = 0; i < count; ++i) {
        auto sum = static_cast<std::int16_t>(a[i] + b[i] + offset);
        sum = sum > least ? sum : least;
        sums[i] = static_cast<std::uint8_t>(sum < most ? sum : most);
    }
}

// Returns the taps of a window from `start` on that lie in the image: from the first one, as many.
struct Inside {
    Index first, count;
    Inside(Index start, Index taps, Index dilation, Index size) {
        first = start < 0 ? (dilation - 1 - start) / dilation : 0;
        const Index last = start >= size ? 0 : smaller(taps, (size - 1 - start) / dilation + 1);
        count = last - first;
    }
};

void pool(const PoolJob& job, std::int64_t sample, std::int64_t y) {
    const Window& window = job.window;
    const Image &from = job.from, &to = job.to;
    const Index top = y * window.stride_y - job.pad_y;
    const Inside rows(top, window.height, window.dilation_y, from.height);
    for (Index x = 0; x < to.width; ++x) {
        const Index left = x * window.stride_x - job.pad_x;
        const Inside columns(left, window.width, window.dilation_x, from.width);
        const std::uint8_t* const first = job.input + from.at(sample, top + rows.first * window.dilation_y,
                                                              left + columns.first * window.dilation_x);
        std::uint8_t* const result = job.output + to.at(sample, y, x);
        for (Index c = 0; c < to.channels; c += kMapped) {
            Mapped largest = {};
            for (Index i = 0; i < rows.count; ++i) {
                const std::uint8_t* codes = first + i * window.dilation_y * from.row() + c;
                for (Index j = 0; j < columns.count; ++j, codes += window.dilation_x * from.stride) {
                    largest = larger(load<Mapped>(codes), largest);
                }
            }
            store_some(largest, to.channels - c, result + c);
        }
    }
}

}  // namespace

const Kernels network_kernels = {
    {kMostPixels[0], kMostPixels[1], kMostPixels[2]}, layer, encode, finish_codes, add, pool};

}  // namespace nmcompile::NMCOMPILE_ISA
