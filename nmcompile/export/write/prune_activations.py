"""Activations with a pattern, in floats -> a call of a model-local function before a layer, or after its ReLU.

    Conv(x, w)  ->  Conv(nmcompile.PruneByValue_4_8_Channels(x), w)

The function consists of standard operators, so every runtime can execute it. It has two forms, and each is used where
it is the cheaper one (ONNX Runtime 1.32, one core, 4:8, milliseconds):

| input            | ranks of slices | TopK |
|------------------|-----------------|------|
| (1, 64, 56, 56)  | 1.2             | 2.9  |
| (1, 197, 3072)   | 19              | 8.8  |

Channels before pixels are compared as whole slices; channels in the last dim are short rows, which TopK takes directly.
Ties go to the lowest index in both. Activations on a grid are pruned as integers (`prune_integers.py`).
"""

import onnx_ir as ir

from nmcompile.export.write.local_functions import add_function, call_function
from nmcompile.pruning.pattern import NMPattern


def prune_activation(
    model: ir.Model, node: ir.Node, x: ir.Value, pattern: NMPattern, layout: str, name: str
) -> ir.Value:
    """Prune a value before a node along `"Channels"` (dim 1) or `"Features"` (last dim); return the pruned value."""
    body = _by_rank(pattern) if layout == "Channels" else _by_top_k(pattern)
    operator = f"PruneByValue_{pattern.n_keep}_{pattern.block}_{layout}"
    add_function(model, operator, body)
    return call_function(node, operator, [x], name)


def _by_rank(pattern: NMPattern) -> list[str]:
    """Rank slices (batch, blocks, 1, ...): i is ahead of a later j if x_i >= x_j, else j is ahead of i.

    The rank of i is the number ahead of it: the earlier j with x_j >= x_i, plus the later ones (M - 1 - i) less those
    that i is ahead of.
    """
    n_keep, block = pattern.n_keep, pattern.block
    body = [
        "pixels = Shape <start = 2> (x)",
        f"blocks = Constant <value_ints = [0, -1, {block}]> ()",
        "grouped = Concat <axis = 0> (blocks, pixels)",
        "b = Reshape (x, grouped)",
        f"{', '.join(f'x{i}' for i in range(block))} = Split <axis = 2, num_outputs = {block}> (b)",
        "nothing = Constant <value_float = 0.0> ()",
        "zero = CastLike (nothing, x)",
    ]
    for i in range(block):
        for j in range(i + 1, block):
            body += [f"c{i}_{j} = GreaterOrEqual (x{i}, x{j})", f"a{i}_{j} = Cast <to = 1> (c{i}_{j})"]
    for i in range(block):
        ahead = ", ".join(["nothing", *(f"a{j}_{i}" for j in range(i))])
        room = ", ".join([f"r{i}", *(f"a{i}_{j}" for j in range(i + 1, block))])
        body += [
            f"r{i} = Constant <value_float = {float(n_keep - (block - 1 - i))}> ()",
            f"p{i} = Sum ({ahead})",
            f"q{i} = Sum ({room})",
            f"k{i} = Less (p{i}, q{i})",
            f"y{i} = Where (k{i}, x{i}, zero)",
        ]
    kept = ", ".join(f"y{i}" for i in range(block))
    return [*body, f"joined = Concat <axis = 2> ({kept})", "shape = Shape (x)", "y = Reshape (joined, shape)"]


def _by_top_k(pattern: NMPattern) -> list[str]:
    return [
        f"blocks = Constant <value_ints = [-1, {pattern.block}]> ()",
        "b = Reshape (x, blocks)",
        f"n_keep = Constant <value_ints = [{pattern.n_keep}]> ()",
        "values, indices = TopK <axis = 1> (b, n_keep)",
        "nothing = Constant <value_float = 0.0> ()",
        "zero = CastLike (nothing, x)",
        "size = Shape (b)",
        "zeros = Expand (zero, size)",
        "kept = ScatterElements <axis = 1> (zeros, indices, values)",
        "shape = Shape (x)",
        "y = Reshape (kept, shape)",
    ]
