// Operators on bytes that replace functions of exported files in ONNX Runtime. Results have the shape of the first input.
#pragma once

#include <algorithm>
#include <cstdint>

#include "machine/instruction_sets.h"
#include "machine/parallel.h"
#include "onnxruntime/api.h"

namespace nmcompile::onnxruntime {

// A shape that is freed at the end of a scope.
struct OwnedShape {
    const Api& api;
    Shape* shape = nullptr;
    ~OwnedShape() {
        if (shape) api.release(shape);
    }
};

// The bytes that an operator reads and writes; both may be the same.
struct Bytes {
    const std::uint8_t* x;
    std::uint8_t* result;
    std::int64_t count;
};

// A custom operator whose kernel is this struct itself: nothing depends on the node.
struct BytesOperator : CustomOperator {
    const char* name_in_files;
    std::size_t inputs;
    Status* (*run)(const Api&, Context*, const Bytes&, InstructionSet);
};

constexpr std::int64_t kPiece = 1 << 16;  // bytes: a few microseconds

// Calls `work` on pieces of whole blocks, on the threads of the session. `work` must not throw.
template <class Work>
Status* in_pieces(const Api& api, Context* context, const Bytes& bytes, const Work& work) {
    struct Job {
        const Bytes& bytes;
        const Work& work;
    } job{bytes, work};
    const auto run = [](void* data, std::size_t number) {
        const Job& job = *static_cast<const Job*>(data);
        const std::int64_t first = static_cast<std::int64_t>(number) * kPiece;
        job.work(Bytes{job.bytes.x + first, job.bytes.result + first, std::min(kPiece, job.bytes.count - first)});
    };
    const auto count = static_cast<std::size_t>(pieces(bytes.count, kPiece));
    if (count > 1) return api.in_parallel(context, run, count, &job);
    if (count == 1) run(&job, 0);
    return nullptr;
}

Status* prune(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa);
Status* prune_wide(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa);
Status* round_steps(const Api& api, Context* context, const Bytes& bytes, InstructionSet isa);

}  // namespace nmcompile::onnxruntime
