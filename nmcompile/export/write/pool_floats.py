"""MaxPool before a pruned activation -> MaxPool of floats, between pairs of Quantize and Dequantize that differ.

    Quantize(MaxPool(x), s, 0)  ->  Quantize(Pair(MaxPool(Pair(x, s, 0)), s, 1), s, 0)
    where Pair(x, s, z) = Dequantize(Quantize(x, s, z), s, z)

ONNX Runtime 1.32 makes a MaxPool of bytes out of a MaxPool between equal pairs. That is fast channels-last only, and
the slices of a pruned activation keep channels first: the stem of ResNet-18 then takes 3.9 ms, and 0.5 ms in floats.
"""

import numpy as np
import onnx_ir as ir

from nmcompile.export.write.build_nodes import add_initializer, insert_pair
from nmcompile.export.write.prune_activations import DOMAIN

BETWEEN = frozenset({"QuantizeLinear", "Clip", "DequantizeLinear", "Identity"})


def leads_to_pruning(value: ir.Value) -> bool:
    """Return whether a pruned activation is computed from a value, through its quantization alone."""
    return any(
        node.domain == DOMAIN or (node.op_type in BETWEEN and leads_to_pruning(node.outputs[0]))
        for node in value.consumers()
    )


def round_before(model: ir.Model, pool: ir.Node) -> ir.Value | None:
    """Quantize the input of a MaxPool as its readers do the output; return the scale, None if they differ.

    A rounding commutes with a maximum.
    """
    x, readers = pool.inputs[0], list(pool.outputs[0].consumers())
    scales = {reader.inputs[1] for reader in readers if reader.op_type == "QuantizeLinear"}
    values = {None if one is None or one.const_value is None else one.const_value.numpy().item() for one in scales}
    if x is None or x.producer() is None or len(values) != 1 or None in values:
        return None
    if any(reader.op_type != "QuantizeLinear" for reader in readers) or len(list(x.consumers())) > 1:
        return None
    scale = next(one for one in scales if one is not None)
    insert_pair(x, scale, add_initializer(model, f"{x.name}.zero_point", np.uint8(0)))
    return scale
