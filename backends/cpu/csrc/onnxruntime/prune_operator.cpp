#include "onnxruntime/operators.h"
#include "onnxruntime/prune_bytes.h"

namespace nmcompile::onnxruntime {
namespace {

Status* prune_blocks(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa, bool wide) {
    if (bytes.count % kBytesBlock != 0) {
        return api.status(Code::invalid_argument, "4:8 pruning: the number of elements is not a multiple of 8");
    }
    const PruneBytes prune = prune_bytes_kernel(isa);
    return in_pieces(api, context, bytes, [prune, wide](const Bytes& piece) {
        prune(piece.x, piece.result, piece.count / kBytesBlock, wide);
    });
}

}  // namespace

Status* prune(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa) {
    return prune_blocks(api, context, bytes, isa, false);
}

Status* prune_wide(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa) {
    return prune_blocks(api, context, bytes, isa, true);
}

}  // namespace nmcompile::onnxruntime
