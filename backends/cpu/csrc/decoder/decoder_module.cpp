// Python interface of decoders: checks that layers and tables have the sizes of the shape.

#include "decoder/decoder_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "decoder/decoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nmcompile {
namespace {

using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Column = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool fits) {
    if (!fits) throw std::invalid_argument("the layers do not fit the shape of the decoder");
}

void require_layer(const FrozenLinear& layer, std::int64_t depth, std::int64_t rows) {
    require(layer.packed.depth() == depth && layer.packed.rows() == rows);
}

// A decoder, and the sizes that its calls have to keep to.
struct CheckedDecoder {
    CheckedDecoder(const DecoderShape& shape, const Table& embedding, const Table& cosines, const Table& sines,
                   const Column& gain, const FrozenLinear& logits)
        : shape(shape), words(static_cast<std::int64_t>(embedding.shape(0))),
          decoder(shape, embedding.data(), cosines.data(), sines.data(), gain.data(), &logits), logits(logits) {}

    DecoderShape shape;
    std::int64_t words;
    Decoder decoder;
    const FrozenLinear& logits;
};

bool has_sizes(const Table& table, std::int64_t rows, std::int64_t columns) {
    return static_cast<std::int64_t>(table.shape(0)) == rows && static_cast<std::int64_t>(table.shape(1)) == columns;
}

void make(CheckedDecoder* self, const std::vector<std::int64_t>& sizes, float epsilon, float scale,
          const Table& embedding, const Table& cosines, const Table& sines, const Column& gain,
          const FrozenLinear& logits) {
    require(sizes.size() == 6);
    const DecoderShape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], epsilon, scale};
    for (const std::int64_t size : sizes) require(size > 0);
    require(s.heads % s.key_heads == 0 && s.head_width % 2 == 0);
    require(has_sizes(cosines, s.length, s.head_width) && has_sizes(sines, s.length, s.head_width));
    require(static_cast<std::int64_t>(embedding.shape(1)) == s.width);
    require(static_cast<std::int64_t>(gain.shape(0)) == s.width && logits.packed.depth() == s.width);
    new (self) CheckedDecoder(s, embedding, cosines, sines, gain, logits);
}

void add(CheckedDecoder& self, const std::vector<const FrozenLinear*>& layers, const Column& before_attention,
         const Column& before_mlp) {
    const DecoderShape& s = self.shape;
    require(layers.size() == 7);
    const std::int64_t queries = s.heads * s.head_width, keys = s.key_heads * s.head_width;
    const std::int64_t sizes[7][2] = {{s.width, queries}, {s.width, keys},     {s.width, keys},    {queries, s.width},
                                      {s.width, s.hidden}, {s.width, s.hidden}, {s.hidden, s.width}};
    for (int i = 0; i < 7; ++i) require_layer(*layers[i], sizes[i][0], sizes[i][1]);
    for (const Column* gain : {&before_attention, &before_mlp}) {
        require(static_cast<std::int64_t>(gain->shape(0)) == s.width);
    }
    self.decoder.add({layers[0], layers[1], layers[2], layers[3], layers[4], layers[5], layers[6],
                      before_attention.data(), before_mlp.data()});
}

bool run(CheckedDecoder& self, const Tokens& tokens, const Logits& logits, const char* isa, unsigned threads) {
    const auto count = static_cast<std::int64_t>(tokens.shape(0));
    const bool has_room = count > 0 && self.decoder.position() + count <= self.shape.length;
    if (!has_room) throw std::invalid_argument("the cache has no room for these tokens");
    for (std::int64_t i = 0; i < count; ++i) {
        if (tokens.data()[i] < 0 || tokens.data()[i] >= self.words) throw std::invalid_argument("no such token");
    }
    if (static_cast<std::int64_t>(logits.shape(0)) != self.logits.packed.rows()) {
        throw std::invalid_argument("the logits do not fit the output layer");
    }
    const InstructionSet chosen = instruction_set(isa);
    nb::gil_scoped_release release;
    return self.decoder.run(tokens.data(), count, logits.data(), chosen, threads);
}

void rewind(CheckedDecoder& self, std::int64_t position) {
    if (position < 0 || position > self.decoder.position()) throw std::invalid_argument("no such position");
    self.decoder.rewind(position);
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<CheckedDecoder>(m, "Decoder", "A Llama on frozen linear layers, with a cache of keys and values.")
        .def("__init__", &make, "sizes"_a, "epsilon"_a, "scale"_a, "embedding"_a.noconvert(), "cosines"_a.noconvert(),
             "sines"_a.noconvert(), "gain"_a.noconvert(), "logits"_a)
        .def("add", &add, "layers"_a, "before_attention"_a.noconvert(), "before_mlp"_a.noconvert(),
             "Add a block: query, key, value, output, gate, up and down; the caller keeps all operands alive.")
        .def("run", &run, "tokens"_a.noconvert(), "logits"_a.noconvert(), "isa"_a, "threads"_a,
             "Append int64 tokens and write the logits after the last; False if a layer reads a NaN.")
        .def("rewind", &rewind, "position"_a, "Forget all positions from this one on.")
        .def_prop_ro("position", [](const CheckedDecoder& self) { return self.decoder.position(); },
                     "How many positions are filled.");
}

}  // namespace nmcompile
