// A Llama on frozen linear layers that decodes with a cache of keys and values. Between the layers it computes in fp32.
#pragma once

#include <cstdint>
#include <vector>

#include "integers/frozen_linear.h"
#include "machine/instruction_sets.h"

namespace nmcompile {

struct DecoderShape {
    std::int64_t width, hidden, heads, key_heads, head_width, length;  // `length` positions fit into the cache
    float epsilon, scale;                                              // of the norms, and of attention's products
};

struct DecoderBlock {
    const FrozenLinear *query, *key, *value, *output, *gate, *up, *down;
    const float *before_attention, *before_mlp;  // gains of the norms
};

class Decoder {
public:
    // `cosines` and `sines` are length x head_width, `embedding` is tokens x width; the caller keeps what is pointed to.
    Decoder(const DecoderShape& shape, const float* embedding, const float* cosines, const float* sines,
            const float* last_gain, const FrozenLinear* logits);
    void add(const DecoderBlock& block);
    std::int64_t position() const { return position_; }
    void rewind(std::int64_t position) { position_ = position; }

    // Appends tokens, and writes the logits after the last one. Returns false, with the position as before, if a layer
    // reads a NaN. There is room for all tokens.
    bool run(const std::int64_t* tokens, std::int64_t count, float* logits, InstructionSet isa, unsigned threads);

private:
    struct Room;
    template <class Kernels>
    bool run_block(const DecoderBlock& block, std::size_t number, Room& room, InstructionSet isa, unsigned threads);
    template <class Kernels>
    void mix(std::size_t number, Room& room, unsigned threads);
    template <class Kernels>
    bool run_with(const std::int64_t* tokens, std::int64_t count, float* logits, InstructionSet isa, unsigned threads);

    DecoderShape shape_;
    const float *embedding_, *cosines_, *sines_, *last_gain_;
    const FrozenLinear* logits_;
    std::vector<DecoderBlock> blocks_;
    std::vector<std::vector<float>> keys_, values_;  // of each block: key_heads x head_width x length
    std::int64_t position_ = 0;
};

}  // namespace nmcompile
