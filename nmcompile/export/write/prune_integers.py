"""Quantized activations with a pattern -> a call of a model-local function of standard operators on their integers.

    Clip(Quantize(x), 0, 15)  ->  nmcompile.PruneIntegers_4_8_Channels(Clip(Quantize(x), 0, 15))

An integer q at place i of a block makes the key M q + (M - 1 - i). No two keys of a block are equal, and of equal
integers the first has the largest key. So an element stays if its key is at least the N-th largest, which a network of
Min and Max finds from M rows, one for each place. Keys of 4-bit integers fit into a byte.

Blocks lie along the last dim in `..._Features`, which `..._Channels` calls.
"""

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from nmcompile.export.write.local_functions import add_function, call_channels_last, call_function
from nmcompile.pruning.pattern import NMPattern

UINT8, INT32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT32


def prune_integers(
    model: ir.Model, node: ir.Node, x: ir.Value, high: int, pattern: NMPattern, layout: str, name: str
) -> ir.Value:
    """Prune uint8 in [0, high] before a node, along `"Channels"` (dim 1) or `"Features"` (last dim)."""
    is_small = (high + 1) * pattern.block <= 2**8
    operator = f"Prune{'' if is_small else 'Large'}Integers_{pattern.n_keep}_{pattern.block}"
    features, channels = f"{operator}_Features", f"{operator}_Channels"
    add_function(model, features, _body(pattern, UINT8 if is_small else INT32))
    if layout == "Features":
        return call_function(node, features, [x], name)
    return call_channels_last(model, node, (features, channels), {"x": x}, name)


def _body(pattern: NMPattern, key_type: int) -> list[str]:
    """Return the lines of the function along the last dim.

    The Reshapes next to the Transposes keep ONNX Runtime from moving these: elements of a row have to lie together.
    The last dim has to be the long one: with a last dim of 1, its Mul by a number takes 200 times as long.
    """
    block = pattern.block
    network = _Network()
    rows = [f"k{place}" for place in range(block)]
    threshold = network.largest(rows[: block // 2], rows[block // 2 :], pattern.n_keep)
    return [
        f"blocks = Constant <value_ints = [-1, {block}]> ()",
        "standing = Reshape (x, blocks)",
        "lying = Transpose <perm = [1, 0]> (standing)",
        f"places_first = Constant <value_ints = [1, {block}, -1]> ()",
        "q = Reshape (lying, places_first)",
        f"wide = Cast <to = {key_type}> (q)",
        f"size = Constant <value_int = {block}> ()",
        "factor = CastLike (size, wide)",
        f"places = Constant <value_ints = [{', '.join(str(block - 1 - place) for place in range(block))}]> ()",
        "column = Constant <value_ints = [-1, 1]> ()",
        "order = Reshape (places, column)",
        "added = CastLike (order, wide)",
        "scaled = Mul (wide, factor)",
        "keys = Add (scaled, added)",
        f"{', '.join(rows)} = Split <axis = 1, num_outputs = {block}> (keys)",
        *network.lines,
        f"keep = GreaterOrEqual (keys, {threshold})",
        "flags = CastLike (keep, q)",
        "kept = Mul (q, flags)",
        f"flat = Constant <value_ints = [{block}, -1]> ()",
        "pruned_lying = Reshape (kept, flat)",
        "pruned_standing = Transpose <perm = [1, 0]> (pruned_lying)",
        "shape = Shape (x)",
        "y = Reshape (pruned_standing, shape)",
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
