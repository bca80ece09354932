#include "network/steps.h"

#include <algorithm>
#include <atomic>

#include "machine/parallel.h"

namespace nmcompile {
namespace {

// Fills pixels of an image, and in a slice nothing between them.
void fill(std::uint8_t* pixel, std::int64_t pixels, const Image& image) {
    const auto code = static_cast<std::uint8_t>(image.fill);
    if (image.stride == image.channels) {
        std::fill_n(pixel, pixels * image.stride, code);
        return;
    }
    for (std::int64_t i = 0; i < pixels; ++i, pixel += image.stride) std::fill_n(pixel, image.channels, code);
}

void fill_halo(std::uint8_t* arena, const Image& image) {
    if (image.halo_y == 0 && image.halo_x == 0) return;
    const std::int64_t band = image.halo_y * (image.width + 2 * image.halo_x);
    for (std::int64_t n = 0; n < image.samples; ++n) {
        fill(arena + image.at(n, -image.halo_y, -image.halo_x), band, image);
        fill(arena + image.at(n, image.height, -image.halo_x), band, image);
        for (std::int64_t y = 0; y < image.height; ++y) {
            fill(arena + image.at(n, y, -image.halo_x), image.halo_x, image);
            fill(arena + image.at(n, y, image.width), image.halo_x, image);
        }
    }
}

// Calls `work(sample, y)` for the rows of an image, some for each task.
template <class Work>
void for_rows(const Image& image, const Run& run, const Work& work) {
    const std::int64_t piece = 1 + kRowsOfATask / std::max<std::int64_t>(1, image.width * image.channels);
    in_parallel(image.samples * image.height, piece, run.threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) work(row / image.height, row % image.height);
    });
}

template <class Element>
const Element* pointer(const std::vector<Element>& all) {
    return all.empty() ? nullptr : all.data();
}

std::uint8_t* scratch_of(std::int64_t bytes) {
    thread_local std::vector<std::uint8_t> scratch;
    if (static_cast<std::int64_t>(scratch.size()) < bytes) scratch.resize(bytes);
    return scratch.data();
}

}  // namespace

bool Encode::run(const Run& run) const {
    const EncodeJob job{run.slots[slot], last, run.arena, to, step, low, high, exact, prunes};
    const std::int64_t parts = pieces(to.height * to.width, kEncoded);
    const std::int64_t piece = 1 + kRowsOfATask / (kEncoded * to.channels);
    std::atomic<bool> fits = true;
    in_parallel(to.samples * parts, piece, run.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            if (!run.kernels.encode(job, part / parts, part % parts * kEncoded)) fits = false;
        }
    });
    fill_halo(run.arena, to);
    return fits;
}

Affine Layer::affine() const {
    return {pointer(steps), pointer(bias), pointer(gain), pointer(shift), layer->sums(), zero};
}

LayerJob Layer::job(const Run& run) const {
    return {.layer = layer.get(), .input = run.arena, .from = from, .pad_y = pad_y, .pad_x = pad_x,
            .affine = affine(), .height = height, .width = width, .output = nullptr, .to = {}, .grid = {1, 0, 0},
            .scaling = nullptr, .finish = {nullptr, false}, .floats = nullptr, .last = false};
}

// A task is a tile of pixels, and a part of the out-channels if there are too few tiles for the threads.
void Layer::run_job(const LayerJob& job, const Run& run) {
    const IntegerLayer& layer = *job.layer;
    const int form = static_cast<int>(layer.form());
    const std::int64_t tiles = pieces(job.pixels(), run.kernels.tile_pixels[form]);
    const std::int64_t pixels = pieces(pieces(job.pixels(), tiles), 2) * 2;
    const std::int64_t lines = layer.lines();
    const bool splits = layer.groups() == 1 || layer.form() == Form::depthwise;
    const std::int64_t parts = splits ? std::min<std::int64_t>(lines, pieces(run.threads, tiles)) : 1;
    const std::int64_t part = pieces(lines, parts);
    const std::int64_t scratch = kTilePixels * layer.blocks() * kDepthOf[form] + kSlack;
    in_parallel(pieces(job.pixels(), pixels) * parts, 1, run.threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t task = first; task < last; ++task) {
            const std::int64_t pixel = task / parts * pixels, line = task % parts * part;
            if (line >= lines) continue;
            const Extent extent{pixel, std::min(pixels, job.pixels() - pixel), line, std::min(part, lines - line)};
            run.kernels.layer(job, extent, layer.form() == Form::depthwise ? nullptr : scratch_of(scratch));
        }
    });
}

bool CodedLayer::run(const Run& run) const {
    LayerJob all = job(run);
    all.output = run.arena;
    all.to = to;
    all.grid = grid;
    all.scaling = &scaling;
    all.finish = {pointer(table), prunes};
    run_job(all, run);
    fill_halo(run.arena, to);
    return true;
}

bool FloatLayer::run(const Run& run) const {
    LayerJob all = job(run);
    all.floats = run.slots[slot];
    all.last = last;
    run_job(all, run);
    return true;
}

bool Recode::run(const Run& run) const {
    const bool is_dense = from.stride == from.channels && to.stride == to.channels;
    const std::int64_t count = is_dense ? 1 : to.width, length = is_dense ? to.width * to.channels : to.channels;
    for_rows(to, run, [&](std::int64_t n, std::int64_t y) {
        for (std::int64_t x = 0; x < count; ++x) {
            std::uint8_t* const codes = run.arena + to.at(n, y, x);
            std::copy_n(run.arena + from.at(n, y, x), length, codes);
            run.kernels.finish(codes, length, {pointer(table), prunes});
        }
    });
    fill_halo(run.arena, to);
    return true;
}

bool Flatten::run(const Run& run) const {
    const std::int64_t area = from.height * from.width;
    for (std::int64_t n = 0; n < from.samples; ++n) {
        std::uint8_t* const codes = run.arena + to.at(n, 0, 0);
        for (std::int64_t pixel = 0; pixel < area; ++pixel) {
            const std::uint8_t* const source = run.arena + from.at(n, pixel / from.width, pixel % from.width);
            for (std::int64_t c = 0; c < from.channels; ++c) codes[c * area + pixel] = source[c];
        }
        run.kernels.finish(codes, to.channels, {pointer(table), prunes});
    }
    fill_halo(run.arena, to);
    return true;
}

bool Add::run(const Run& run) const {
    const bool is_dense = a.stride == a.channels && b.stride == b.channels && to.stride == to.channels;
    const std::int64_t count = is_dense ? 1 : to.width, length = is_dense ? to.width * to.channels : to.channels;
    for_rows(to, run, [&](std::int64_t n, std::int64_t y) {
        for (std::int64_t x = 0; x < count; ++x) {
            run.kernels.add(run.arena + a.at(n, y, x), run.arena + b.at(n, y, x), length, offset, low, high,
                            run.arena + to.at(n, y, x));
        }
    });
    fill_halo(run.arena, to);
    return true;
}

bool MaxPool::run(const Run& run) const {
    const PoolJob job{run.arena, from, run.arena, to, window, pad_y, pad_x};
    for_rows(to, run, [&](std::int64_t n, std::int64_t y) { run.kernels.pool(job, n, y); });
    fill_halo(run.arena, to);
    return true;
}

bool Decode::run(const Run& run) const {
    float* const result = run.slots[slot];
    const std::int64_t area = from.height * from.width;
    for_rows(from, run, [&](std::int64_t n, std::int64_t y) {
        for (std::int64_t c = 0; c < from.channels; ++c) {
            float* const row = result + (n * from.channels + c) * area + y * from.width;
            const std::uint8_t* const codes = run.arena + from.at(n, y, 0) + c;
            for (std::int64_t x = 0; x < from.width; ++x) row[x] = values[codes[x * from.stride]];
        }
    });
    return true;
}

}  // namespace nmcompile
