// Bytes of one step to those of another (see nmcompile/export/write/round_integers.py), by a table of all bytes.

#include <cstring>

#include "network/network_isa.h"
#include "onnxruntime/operators.h"

namespace nmcompile::onnxruntime {
namespace {

constexpr std::int64_t kCached = 1 << 12;  // bytes that are copied before they are looked up

// The inputs after the bytes, in their order.
struct Grids {
    const float* scale;
    const std::uint8_t* zero;
    const float* step;
    const std::uint8_t *offset, *low, *high;

    // The arithmetic of ONNX Runtime's DequantizeLinear, QuantizeLinear and Clip.
    std::uint8_t rounded(int byte) const {
        constexpr float kRound = 3 << 22;  // a sum with it has no place for a fraction, and is rounded to even
        const float least = static_cast<float>(-*offset), most = static_cast<float>(255 - *offset);
        float steps = static_cast<float>(byte - *zero) * *scale / *step;
        steps = steps > least ? steps : least;  // a NaN too
        steps = steps < most ? steps : most;
        const int quantized = static_cast<int>(steps + kRound - kRound) + *offset;
        return static_cast<std::uint8_t>(std::min(std::max(quantized, int{*low}), int{*high}));
    }
};

template <class T>
Status* number(const Api& api, Context* context, std::size_t index, const T** found) {
    const Value* value = nullptr;
    OwnedShape owned{api};
    std::size_t count = 0;
    if (Status* status = api.input(context, index, &value)) return status;
    if (Status* status = api.shape(value, &owned.shape)) return status;
    if (Status* status = api.count(owned.shape, &count)) return status;
    if (count != 1) return api.status(Code::invalid_argument, "rounding of integers: an input is not a single number");
    void* data = nullptr;
    Status* const status = api.data(value, &data);
    *found = static_cast<const T*>(data);
    return status;
}

Status* read(const Api& api, Context* context, Grids& grids) {
    if (Status* status = number(api, context, 1, &grids.scale)) return status;
    if (Status* status = number(api, context, 2, &grids.zero)) return status;
    if (Status* status = number(api, context, 3, &grids.step)) return status;
    if (Status* status = number(api, context, 4, &grids.offset)) return status;
    if (Status* status = number(api, context, 5, &grids.low)) return status;
    return number(api, context, 6, &grids.high);
}

}  // namespace

Status* round_steps(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa) {
    Grids grids;
    if (Status* status = read(api, context, grids)) return status;
    std::uint8_t table[kCodes];
    for (int byte = 0; byte < kCodes; ++byte) table[byte] = grids.rounded(byte);
    const auto map = network_kernels(isa).finish;
    return in_pieces(api, context, bytes, [map, &table](const Bytes& piece) {
        for (std::int64_t i = 0; i < piece.count; i += kCached) {
            const std::int64_t count = std::min(kCached, piece.count - i);
            std::memmove(piece.result + i, piece.x + i, static_cast<std::size_t>(count));
            map(piece.result + i, count, {table, false});
        }
    });
}

}  // namespace nmcompile::onnxruntime
