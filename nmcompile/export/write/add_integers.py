"""Sums, concatenations and pooled values of integers with one step -> integers again, so that no float is computed.

    Relu(Add(Dequantize(a, s), Dequantize(b, s)))  ->  Dequantize(Quantize(Relu(Add(...)), s), s)

Nothing is rounded: the values are whole steps already, and the pair is written only where they fit into 8 bits. ONNX
Runtime makes one integer operator of what stands between the pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nmcompile.export.write.build_nodes import add_initializer, insert_pair, only_rectified

STORED = frozenset({"Add", "Concat", "MaxPool"})
MOVED = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"})


@dataclass(frozen=True)
class _Steps:
    """Whole multiples of a scale, from `low` to `high`."""

    scale: float
    low: int
    high: int

    @property
    def zero(self) -> int | None:
        """Return the zero point with which they fit into uint8; None if they do not."""
        if self.low >= 0:
            return 0 if self.high <= 255 else None
        return 128 if self.low >= -128 and self.high <= 127 else None


def add_integers(model: ir.Model) -> None:
    """Quantize what is computed from integers of one scale and consists of whole steps itself, in place."""
    steps: dict[ir.Value, _Steps] = {}
    for node in list(model.graph):
        found = _steps(node, steps)
        if found is None:
            continue
        steps[node.outputs[0]] = found
        if _is_stored(node) and found.zero is not None:
            steps[_store(model, node, found, found.zero)] = found


def _is_stored(node: ir.Node) -> bool:
    """Return whether a node computes something that is read by more than ReLUs, which join the operator before them."""
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    is_sum = before is not None and before.op_type in STORED and node.op_type == "Relu"
    return (is_sum or node.op_type in STORED) and not only_rectified(node.outputs[0])


def _store(model: ir.Model, node: ir.Node, steps: _Steps, zero: int) -> ir.Value:
    result = node.outputs[0]
    scale = add_initializer(model, f"{result.name}.scale", np.float32(steps.scale))
    return insert_pair(result, scale, add_initializer(model, f"{result.name}.zero_point", np.uint8(zero)))


def _steps(node: ir.Node, steps: Mapping[ir.Value, _Steps]) -> _Steps | None:
    """Return the steps that a node's result consists of; None if it is not known to."""
    if node.op_type == "DequantizeLinear":
        return _dequantized(node)
    values = node.inputs if node.op_type in ("Add", "Concat") else node.inputs[:1]
    read = [steps[value] for value in values if value is not None and value in steps]
    if not read or len(read) < len(values) or len({one.scale for one in read}) > 1:
        return None
    scale, lows, highs = read[0].scale, [one.low for one in read], [one.high for one in read]
    if node.op_type == "Add":
        return _Steps(scale, sum(lows), sum(highs))
    if node.op_type == "Relu":
        return _Steps(scale, max(0, *lows), max(0, *highs))
    return _Steps(scale, min(lows), max(highs)) if node.op_type in STORED | MOVED else None


def _dequantized(node: ir.Node) -> _Steps | None:
    """Return the steps of integers that a Clip bounds, by one scale."""
    clip = None if node.inputs[0] is None else node.inputs[0].producer()
    if clip is None or clip.op_type != "Clip":
        return None
    constants = _numbers([*node.inputs[1:], *clip.inputs[1:]])
    if constants is None:
        return None
    scale, zero, low, high = constants
    return _Steps(scale, int(low - zero), int(high - zero))


def _numbers(values: Sequence[ir.Value | None]) -> list[float] | None:
    tensors = [None if value is None else value.const_value for value in values]
    if any(tensor is None or tensor.size != 1 for tensor in tensors):
        return None
    return [tensor.numpy().item() for tensor in tensors if tensor is not None]
