#include "decoder/decoder.h"

#include <algorithm>

#include "decoder/decoder_isa.h"
#include "machine/parallel.h"

namespace nmcompile {
namespace {

constexpr std::int64_t kFew = 1 << 17;  // multiplications of attention, which take less than another thread needs

#define NMCOMPILE_KERNELS(isa)                              \
    struct kernels_##isa {                                  \
        static constexpr auto attend = isa::attend;         \
        static constexpr auto normalize = isa::normalize;   \
        static constexpr auto gate_values = isa::gate_values; \
        static constexpr auto turn = isa::turn;             \
    };
NMCOMPILE_KERNELS(baseline)
#if defined(__x86_64__)
NMCOMPILE_KERNELS(v3)
NMCOMPILE_KERNELS(v4)
#endif
#undef NMCOMPILE_KERNELS

}  // namespace

// The values of some tokens: tokens x the width of each.
struct Decoder::Room {
    Room(const DecoderShape& s, std::int64_t count)
        : count(count), residual(count * s.width), normalized(count * s.width), result(count * s.width),
          queries(count * s.heads * s.head_width), mixed(queries.size()), keys(count * s.key_heads * s.head_width),
          values(keys.size()), gate(count * s.hidden), up(gate.size()) {}

    std::int64_t count;
    std::vector<float> residual, normalized, result, queries, mixed, keys, values, gate, up;
};

Decoder::Decoder(const DecoderShape& shape, const float* embedding, const float* cosines, const float* sines,
                 const float* last_gain, const FrozenLinear* logits)
    : shape_(shape), embedding_(embedding), cosines_(cosines), sines_(sines), last_gain_(last_gain), logits_(logits) {}

void Decoder::add(const DecoderBlock& block) {
    const std::size_t size = shape_.key_heads * shape_.head_width * shape_.length;
    blocks_.push_back(block);
    keys_.emplace_back(size);
    values_.emplace_back(size);
}

// Appends turned keys, and values, to the cache, and lets each token look at those up to itself.
template <class Kernels>
void Decoder::mix(std::size_t number, Room& room, unsigned threads) {
    const auto& s = shape_;
    const std::int64_t group = s.heads / s.key_heads, head = s.head_width * s.length;
    const std::int64_t work = s.heads * s.head_width * room.count * (position_ + room.count) * 2;
    in_parallel(s.key_heads, 1, work < kFew ? 1 : threads, [&](std::int64_t first, std::int64_t last) {
        std::vector<float> scores(s.length);
        for (std::int64_t h = first; h < last; ++h) {
            float *const keys = keys_[number].data() + h * head, *const values = values_[number].data() + h * head;
            for (std::int64_t t = 0; t < room.count; ++t) {
                const std::int64_t at = position_ + t, in_cache = (t * s.key_heads + h) * s.head_width;
                const std::int64_t query = (t * s.heads + h * group) * s.head_width;
                const float *const cosines = cosines_ + at * s.head_width, *const sines = sines_ + at * s.head_width;
                Kernels::turn(room.keys.data() + in_cache, cosines, sines, s.head_width);
                for (std::int64_t d = 0; d < s.head_width; ++d) keys[d * s.length + at] = room.keys[in_cache + d];
                std::copy_n(room.values.data() + in_cache, s.head_width, values + at * s.head_width);
                for (std::int64_t q = 0; q < group; ++q) {
                    Kernels::turn(room.queries.data() + query + q * s.head_width, cosines, sines, s.head_width);
                }
                Kernels::attend({room.queries.data() + query, keys, values, scores.data(), room.mixed.data() + query,
                                 group, s.head_width, s.length, at + 1, s.scale});
            }
        }
    });
}

template <class Kernels>
bool Decoder::run_block(const DecoderBlock& block, std::size_t number, Room& room, InstructionSet isa,
                        unsigned threads) {
    const auto linear = [&](const FrozenLinear* layer, const std::vector<float>& input, std::vector<float>& output) {
        return layer->run(input.data(), room.count, output.data(), isa, threads);
    };
    const auto normalize = [&](const float* gain) {
        for (std::int64_t t = 0; t < room.count; ++t) {
            Kernels::normalize(room.residual.data() + t * shape_.width, gain, shape_.epsilon, shape_.width,
                               room.normalized.data() + t * shape_.width);
        }
    };
    const auto add = [&] {
        for (std::size_t i = 0; i < room.residual.size(); ++i) room.residual[i] += room.result[i];
    };
    normalize(block.before_attention);
    if (!linear(block.query, room.normalized, room.queries) || !linear(block.key, room.normalized, room.keys) ||
        !linear(block.value, room.normalized, room.values)) {
        return false;
    }
    mix<Kernels>(number, room, threads);
    if (!linear(block.output, room.mixed, room.result)) return false;
    add();
    normalize(block.before_mlp);
    if (!linear(block.gate, room.normalized, room.gate) || !linear(block.up, room.normalized, room.up)) return false;
    Kernels::gate_values(room.gate.data(), room.up.data(), static_cast<std::int64_t>(room.gate.size()));
    if (!linear(block.down, room.gate, room.result)) return false;
    add();
    return true;
}

template <class Kernels>
bool Decoder::run_with(const std::int64_t* tokens, std::int64_t count, float* logits, InstructionSet isa,
                       unsigned threads) {
    Room room(shape_, count);
    for (std::int64_t t = 0; t < count; ++t) {
        std::copy_n(embedding_ + tokens[t] * shape_.width, shape_.width, room.residual.data() + t * shape_.width);
    }
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
        if (!run_block<Kernels>(blocks_[i], i, room, isa, threads)) return false;
    }
    const float* const last = room.residual.data() + (count - 1) * shape_.width;
    Kernels::normalize(last, last_gain_, shape_.epsilon, shape_.width, room.normalized.data());
    if (!logits_->run(room.normalized.data(), 1, logits, isa, threads)) return false;
    position_ += count;
    return true;
}

bool Decoder::run(const std::int64_t* tokens, std::int64_t count, float* logits, InstructionSet isa,
                  unsigned threads) {
#if defined(__x86_64__)
    if (isa == InstructionSet::v4) return run_with<kernels_v4>(tokens, count, logits, isa, threads);
    if (isa == InstructionSet::v3) return run_with<kernels_v3>(tokens, count, logits, isa, threads);
#endif
    return run_with<kernels_baseline>(tokens, count, logits, isa, threads);
}

}  // namespace nmcompile
