"""2:4 weights of at most 4 bits -> packed pairs, from which a function of standard operators makes the INT8 weights.

    DequantizeLinear(int8 w)  ->  DequantizeLinear(Transpose(nmcompile.UnpackPairs(kept, triples)))

ONNX Runtime folds the function when it loads the file, into the graph that it has with the INT8 weights. Other
weights of at most 4 bits become INT4, two in a byte; ONNX Runtime has fewer kernels for these.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from nmcompile.export.write.build_nodes import add_initializer, insert_before
from nmcompile.export.write.find_layers import CONVS, LayerNode
from nmcompile.export.write.trace_model import OPSET
from nmcompile.files.packed_pairs import DOMAIN, OPERATOR, Integers, holds, pack, unpack_function


def pack_weights(model: ir.Model, sites: Sequence[LayerNode], target: str) -> None:
    """Pack the INT8 weights of 4-bit grids, in place. TensorRT takes pairs nowhere, and INT4 with float inputs."""
    packed: set[ir.Node] = set()
    for site in sites:
        node, grid = _dequantize(site), site.deployed.weight.grid
        if node is None or grid is None or grid.bits > 4 or node in packed:
            continue
        packed.add(node)
        content = node.inputs[0]
        assert content is not None and content.const_value is not None
        weight, in_dim = content.const_value.numpy(), _in_dim(site)
        if target == "onnxruntime" and holds(np.moveaxis(weight, in_dim, -1)):
            node.replace_input_with(0, _unpacked(model, node, weight, in_dim, f"{site.name}.weight"))
        else:
            _halve(node)


def _dequantize(site: LayerNode) -> ir.Node | None:
    operand = site.node.inputs[1]
    node = None if operand is None else operand.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _in_dim(site: LayerNode) -> int:
    """Return the dim of the weight, as the node reads it, along which blocks lie."""
    if site.node.op_type in CONVS:
        return site.deployed.layer.in_dim
    return -1 if site.out_dim == 0 else -2


def _unpacked(model: ir.Model, node: ir.Node, weight: Integers, in_dim: int, name: str) -> ir.Value:
    """Insert the nodes that make a weight from its pairs; return the weight."""
    key = (DOMAIN, OPERATOR, "")
    if key not in model.functions:
        model.functions[key] = ir.serde.deserialize_function(unpack_function(OPSET))
        model.opset_imports[DOMAIN] = 1
    parts = zip(("kept", "triples"), pack(np.moveaxis(weight, in_dim, -1)), strict=True)
    stored = [add_initializer(model, f"{name}_{part}", content) for part, content in parts]
    unpacked = insert_before(node, OPERATOR, stored, f"{name}_unpacked", domain=DOMAIN)
    order = [*range(weight.ndim - 1)]
    order.insert(in_dim % weight.ndim, weight.ndim - 1)
    if order == sorted(order):
        return unpacked
    result = insert_before(node, "Transpose", [unpacked], f"{name}_quantized")
    producer = result.producer()
    assert producer is not None
    producer.attributes["perm"] = ir.AttrInt64s("perm", order)
    return result


def _halve(node: ir.Node) -> None:
    """Store the weight and its zero point as INT4."""
    for value in (node.inputs[0], node.inputs[2]):
        assert value is not None and value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(ml_dtypes.int4), name=value.name)
        value.type = ir.TensorType(value.const_value.dtype)
