"""Quantized activations with a pattern -> a call of a model-local function of standard operators on their integers.

    Clip(Quantize(x), 0, 15)  ->  nmcompile.PruneIntegers_4_8_Channels(Clip(Quantize(x), 0, 15))

An integer q at place i of a block makes the key M q + (M - 1 - i). No two keys of a block are equal, and of equal
integers the first has the largest key. So an element stays if its key is at least the N-th largest, which a network of
Min and Max finds from the M slices of the tensor. Keys of 4-bit integers fit into a byte.
"""

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from nmcompile.export.write.prune_activations import call_function
from nmcompile.pruning.pattern import NMPattern

UINT8, INT32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT32


def prune_integers(
    model: ir.Model, node: ir.Node, x: ir.Value, high: int, pattern: NMPattern, layout: str, name: str
) -> ir.Value:
    """Prune uint8 in [0, high] before a node, along `"Channels"` (dim 1) or `"Features"` (last dim)."""
    is_small = (high + 1) * pattern.block <= 2**8
    operator = f"Prune{'' if is_small else 'Large'}Integers_{pattern.n_keep}_{pattern.block}_{layout}"
    body = _body(pattern, layout, UINT8 if is_small else INT32)
    return call_function(model, node, operator, body, x, name)


def _body(pattern: NMPattern, layout: str, key_type: int) -> list[str]:
    block = pattern.block
    inner = ["extents = Shape <start = 2> (x)", "pixels = ReduceProd <keepdims = 1> (extents)"]
    if layout == "Features":
        inner = ["pixels = Constant <value_ints = [1]> ()"]
    network = _Network()
    slices = [f"k{place}" for place in range(block)]
    threshold = network.largest(slices[: block // 2], slices[block // 2 :], pattern.n_keep)
    return [
        *inner,
        f"blocks = Constant <value_ints = [-1, {block}]> ()",
        "grouped = Concat <axis = 0> (blocks, pixels)",
        "q = Reshape (x, grouped)",
        f"wide = Cast <to = {key_type}> (q)",
        f"size = Constant <value_int = {block}> ()",
        "factor = CastLike (size, wide)",
        f"places = Constant <value_ints = [{', '.join(str(block - 1 - place) for place in range(block))}]> ()",
        "column = Constant <value_ints = [-1, 1]> ()",
        "standing = Reshape (places, column)",
        "order = CastLike (standing, wide)",
        "scaled = Mul (wide, factor)",
        "keys = Add (scaled, order)",
        f"{', '.join(slices)} = Split <axis = 1, num_outputs = {block}> (keys)",
        *network.lines,
        f"keep = GreaterOrEqual (keys, {threshold})",
        "flags = CastLike (keep, q)",
        "kept = Mul (q, flags)",
        "shape = Shape (x)",
        "y = Reshape (kept, shape)",
    ]


class _Network:
    """A selection network: its lines, each a Min or a Max of two values."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def largest(self, left: Sequence[str], right: Sequence[str], rank: int) -> str:
        """Return the value of this rank, 1 for the largest, among the two lists."""
        return self._merged(self._sorted(left), self._sorted(right), rank)

    def _sorted(self, values: Sequence[str]) -> list[str]:
        """Return the values in falling order."""
        if len(values) < 2:
            return list(values)
        left, right = self._sorted(values[: len(values) // 2]), self._sorted(values[len(values) // 2 :])
        return [self._merged(left, right, rank) for rank in range(1, len(values) + 1)]

    def _merged(self, left: Sequence[str], right: Sequence[str], rank: int) -> str:
        """Return the value of this rank among two lists in falling order.

        If i of the `rank` largest come from the left list, it is the smaller of left[i] and right[rank - i]; any other
        i gives something that is no larger.
        """
        found = [right[rank - 1]] if rank <= len(right) else []
        for i in range(max(1, rank - len(right)), min(rank, len(left) + 1)):
            found.append(self._add("Min", left[i - 1], right[rank - i - 1]))
        found += [left[rank - 1]] if rank <= len(left) else []
        result = found[0]
        for other in found[1:]:
            result = self._add("Max", result, other)
        return result

    def _add(self, operator: str, left: str, right: str) -> str:
        name = f"n{len(self.lines)}"
        self.lines.append(f"{name} = {operator} ({left}, {right})")
        return name
