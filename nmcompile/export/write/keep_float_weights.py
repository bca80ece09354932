"""Float weights that ONNX Runtime would round -> a Sum of one input after their layer.

    Conv(dequantized x, w) -> Relu -> QuantizeLinear   ->   Sum(Conv(dequantized x, w)) -> Relu -> QuantizeLinear

Between a DequantizeLinear and a QuantizeLinear ONNX Runtime 1.32 itself rounds the float weight of a Conv or Gemm to 8
bits: up to 2 % off in one layer. A Sum of one input computes nothing, and no optimization removes it.
"""

from nmcompile.export.write.build_nodes import insert_behind
from nmcompile.export.write.find_layers import LayerNode
from nmcompile.export.write.keep_float_biases import feeds_quantizer

ROUNDED = frozenset({"Conv", "Gemm"})


def keep_weight(site: LayerNode) -> None:
    """Keep ONNX Runtime from rounding a layer's weight where it would, in place."""
    node = site.node
    x, weight = node.inputs[:2]
    is_float = weight is not None and weight.const_value is not None
    producer = None if x is None else x.producer()
    is_dequantized = producer is not None and producer.op_type == "DequantizeLinear"
    if node.op_type in ROUNDED and is_float and is_dequantized and feeds_quantizer(node.outputs[0]):
        insert_behind(node, "Sum", [], f"{site.name}.sum")
