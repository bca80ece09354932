"""Calls of `RoundIntegers` as the nodes that they stand for, so that each layer's part begins with floats."""

import onnx
from onnx import helper

from nmcompile.export.write.local_functions import DOMAIN
from nmcompile.export.write.round_integers import ROUND


def spell_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that computes the same, with the names that the nodes had before they were replaced."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:]
    for node in proto.graph.node:
        is_call = node.domain == DOMAIN and node.op_type.startswith(ROUND)
        result.graph.node.extend(_nodes(node) if is_call else [node])
    return result


def _nodes(call: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, scale, zero, step, offset, low, high = call.input
    [result], name = call.output, call.name.removesuffix(".clip")
    floats, integers = f"{name}.sum", f"{name}.quantize"
    return [
        helper.make_node("DequantizeLinear", [x, scale, zero], [floats], name=floats),
        helper.make_node("QuantizeLinear", [floats, step, offset], [integers], name=integers),
        helper.make_node("Clip", [integers, low, high], [result], name=call.name),
    ]
