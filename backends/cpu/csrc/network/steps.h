// The steps of a program. Whoever writes an image writes its halo.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "network/program.h"

namespace nmcompile {

using Factors = std::vector<float>;       // of whole blocks of out-channels, or none
using Table = std::vector<std::uint8_t>;  // kCodes of them, or none

struct Encode : Step {
    int slot;
    Image to;
    float step;
    int low, high;
    bool last = false;   // the floats are channels last
    bool exact = false;  // what is not on the grid already is refused as a NaN is
    bool prunes = false;
    Encode(int slot, Image to, float step, int low, int high) : slot(slot), to(to), step(step), low(low), high(high) {}
    bool run(const Run&) const override;
};

struct Layer : Step {
    std::shared_ptr<const IntegerLayer> layer;
    Image from;
    std::int32_t zero;
    std::int64_t pad_y, pad_x, height, width;
    Factors steps, bias, gain, shift;
    bool run(const Run&) const override = 0;

    Affine affine() const;

protected:
    LayerJob job(const Run&) const;
    static void run_job(const LayerJob&, const Run&);
};

struct CodedLayer : Layer {
    Image to;
    Grid grid;
    Scaling scaling;
    Table table;
    bool prunes;
    bool run(const Run&) const override;
};

struct FloatLayer : Layer {
    int slot;
    bool last = false;  // the floats are channels last
    bool run(const Run&) const override;
};

struct Recode : Step {
    Image from, to;
    Table table;
    bool prunes;
    Recode(Image from, Image to, Table table, bool prunes)
        : from(from), to(to), table(std::move(table)), prunes(prunes) {}
    bool run(const Run&) const override;
};

// In the order of channels, height and width, to one pixel a sample.
struct Flatten : Recode {
    using Recode::Recode;
    bool run(const Run&) const override;
};

struct Add : Step {
    Image a, b, to;
    int offset, low, high;
    Add(Image a, Image b, Image to, int offset, int low, int high)
        : a(a), b(b), to(to), offset(offset), low(low), high(high) {}
    bool run(const Run&) const override;
};

struct MaxPool : Step {
    Image from, to;
    Window window;
    std::int64_t pad_y, pad_x;
    MaxPool(Image from, Image to, Window window, std::int64_t pad_y, std::int64_t pad_x)
        : from(from), to(to), window(window), pad_y(pad_y), pad_x(pad_x) {}
    bool run(const Run&) const override;
};

struct Decode : Step {
    Image from;
    int slot;
    Factors values;  // kCodes of them
    Decode(Image from, int slot, Factors values) : from(from), slot(slot), values(std::move(values)) {}
    bool run(const Run&) const override;
};

}  // namespace nmcompile
