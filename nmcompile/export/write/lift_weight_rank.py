"""Integer weights of a MatMul get a leading dim of 1, unless its input is unsigned integers.

    MatMul(x, DequantizeLinear(w (in, out)))  ->  MatMul(x, DequantizeLinear(w (1, in, out)))

The product is the same. With a weight of two dims and a float input ONNX Runtime 1.32 makes a MatMulNBits, which itself
rounds the *input* to 8 bits: 0.5 % off in one layer. With a signed input of a fixed shape it makes a Gemm and then
fails to load: "output_dtype INT8 does not match y_zero_point type UINT8". Three dims avoid both.
"""

import numpy as np
import onnx_ir as ir

from nmcompile.export.write.build_nodes import add_initializer
from nmcompile.export.write.find_layers import LayerNode


def lift_weight(model: ir.Model, site: LayerNode) -> None:
    """Add the dim if it is needed, in place; for an input of two dims, a Gemm computes the same numbers instead."""
    dequantize = _producer(site.node.inputs[1])
    if site.node.op_type != "MatMul" or dequantize is None or dequantize.op_type != "DequantizeLinear":
        return
    x, content = site.node.inputs[0], dequantize.inputs[0]
    if _is_unsigned(x) or content is None or content.const_value is None or len(content.const_value.shape) > 2:
        return
    if _rank(x) == 2:
        site.node.op_type = "Gemm"
        return
    name, content.name = str(content.name), f"{content.name}.flat"
    lifted = add_initializer(model, name, content.const_value.numpy()[np.newaxis])
    dequantize.replace_input_with(0, lifted)
    axis = dequantize.attributes.get("axis")
    if axis is not None:
        dequantize.attributes["axis"] = ir.AttrInt64("axis", axis.as_int() + 1)


def _is_unsigned(x: ir.Value | None) -> bool:
    node = _producer(x)
    zero = None if node is None or node.op_type != "DequantizeLinear" else node.inputs[2]
    return zero is not None and zero.dtype == ir.DataType.UINT8


def _rank(x: ir.Value | None) -> int | None:
    """Return the rank of a value, looking through the nodes that quantize it."""
    while x is not None and x.shape is None:
        node = x.producer()
        x = None if node is None else node.inputs[0]
    return None if x is None or x.shape is None else len(x.shape)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
