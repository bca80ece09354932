"""Biases of whole accumulator steps in a Gemm that is read in floats -> int32.

    Gemm(Dequantize(x, s), Dequantize(w, t), b)  ->  Gemm(Dequantize(x, s), Dequantize(w, t), Dequantize(n, s t))

ONNX Runtime makes an integer Gemm of that. With a float bias it dequantizes the weight in every run, which takes 0.12
of the 10.5 ms of a ResNet-18. Where a QuantizeLinear follows, it rounds a float bias itself (`keep_float_biases.py`).
"""

import numpy as np
import onnx_ir as ir

from nmcompile.export.write.build_nodes import add_initializer, insert_before
from nmcompile.export.write.find_layers import LayerNode
from nmcompile.export.write.keep_float_biases import constant_of, feeds_quantizer, is_whole, scale_of


def store_bias(model: ir.Model, site: LayerNode) -> None:
    """Store a layer's bias as integers if it consists of whole steps, in place."""
    node = site.node
    bias = constant_of(node.inputs[2]) if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    scales = [scale_of(operand) for operand in node.inputs[:2]]
    if bias is None or scales[0] is None or scales[1] is None or feeds_quantizer(node.outputs[0]):
        return
    step = (scales[0] * scales[1]).astype(np.float32)
    if not is_whole(bias, scales[0] * scales[1]):
        return
    integers = add_initializer(model, f"{site.name}.bias_quantized", np.round(bias / step).astype(np.int32))
    scale = add_initializer(model, f"{site.name}.bias_scale", step)
    axes = [ir.AttrInt64("axis", 0)] if step.ndim else []
    whole = insert_before(node, "DequantizeLinear", [integers, scale], f"{site.name}.bias", attributes=axes)
    node.replace_input_with(2, whole)
