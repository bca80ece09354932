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
    floats = {tuple(one.input): one.output[0] for one in proto.graph.node if one.op_type == "DequantizeLinear"}
    for node in proto.graph.node:
        is_call = node.domain == DOMAIN and node.op_type.startswith(ROUND)
        result.graph.node.extend(_nodes(node, floats) if is_call else [node])
    return result


def _nodes(call: onnx.NodeProto, floats: dict[tuple[str, ...], str]) -> list[onnx.NodeProto]:
    """Return the nodes of a call; `floats` names the values that are dequantized so far, by their operands."""
    *source, step, offset, low, high = call.input
    name = call.name.removesuffix(".clip")
    total, integers = floats.get(tuple(source)), f"{name}.quantize"
    nodes = []
    if total is None:
        total = floats[tuple(source)] = f"{name}.sum"
        nodes = [helper.make_node("DequantizeLinear", source, [total], name=total)]
    quantize = helper.make_node("QuantizeLinear", [total, step, offset], [integers], name=integers)
    return [*nodes, quantize, helper.make_node("Clip", [integers, low, high], call.output, name=call.name)]
