// The exact transposable 2:4 mask of a tensor, and the results that follow from it, in one pass over the weight.
#pragma once

#include <cstdint>

#include "machine/instruction_sets.h"

namespace nmcompile {

constexpr int kMaxBatchDims = 6;

// A tensor over the two tiled dims and the batch dims; strides in elements, `data` null if it is not wanted.
struct TileOperand {
    void* data = nullptr;
    std::int64_t row = 0, column = 0;
    std::int64_t batch[kMaxBatchDims] = {};
};

// The inputs and outputs of a job. Tiles count as padded with zeros at the edges; the packed forms need full ones.
struct TransposableJob {
    std::int64_t rows, columns;
    int batch_dims;
    std::int64_t batch[kMaxBatchDims];  // sizes

    TileOperand x;                                    // T, read only
    TileOperand mask;                                 // bytes, 1 where kept
    TileOperand pruned;                               // T, zero where not kept
    TileOperand forward_values, forward_indices;      // packed along columns: (rows, columns / 2) and (rows, bytes)
    TileOperand backward_values, backward_indices;    // packed along rows: (rows / 2, columns) and (bytes, columns)
};

// Runs the job on up to `threads` threads; T is double, float, Half or BFloat16 (storage.h). The mask equals
// nmcompile/pruning/tile_enumeration.py bit for bit, whatever the instruction set and the number of threads.
template <class T>
void transposable(const TransposableJob& job, InstructionSet isa, unsigned threads);

}  // namespace nmcompile
