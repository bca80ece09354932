"""New nodes and initializers for a graph."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def add_initializer(model: ir.Model, name: str, content: npt.NDArray[np.generic] | np.generic) -> ir.Value:
    """Add a constant to the graph; a name that is taken gets a number."""
    taken = model.graph.initializers
    unique = next(n for n in (name, *(f"{name}.{count}" for count in range(2, len(taken) + 3))) if n not in taken)
    tensor = ir.tensor(content, name=unique)
    value = ir.Value(
        name=unique, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def insert_before(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value],
    name: str,
    *,
    domain: str = "",
    attributes: Sequence[ir.Attr] = (),
) -> ir.Value:
    """Insert a new node before another one and return its output."""
    new = ir.Node(domain, op_type, inputs, attributes, name=name)
    new.outputs[0].name = name
    node.prepend(new)
    return new.outputs[0]


def insert_behind(node: ir.Node, op_type: str, others: Sequence[ir.Value], name: str) -> None:
    """Insert a node between a node's output and all its readers; it also reads `others`, and takes over the name."""
    output = node.outputs[0]
    new = ir.Node("", op_type, [output, *others], name=name)
    result = new.outputs[0]
    result.shape, result.type = output.shape, output.type
    users = [use for use in output.uses() if use.node is not new]
    node.append(new)
    result.name, output.name = output.name, f"{output.name}.product"
    for user, operand in users:
        user.replace_input_with(operand, result)
    assert node.graph is not None
    outputs = node.graph.outputs
    for index, one in enumerate(outputs):
        if one is output:
            outputs[index] = result


def insert_pair(value: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """Insert a Quantize and a Dequantize between a value and its readers; return the result."""
    users = list(value.uses())
    quantize = ir.Node("", "QuantizeLinear", [value, scale, zero], name=f"{value.name}.quantize")
    dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{value.name}.dequantize")
    for node in (quantize, dequantize):
        node.outputs[0].name = node.name
    result = dequantize.outputs[0]
    result.shape, result.type = value.shape, value.type
    producer = value.producer()
    assert producer is not None
    producer.append([quantize, dequantize])
    for user, operand in users:
        user.replace_input_with(operand, result)
    return result


def only_rectified(value: ir.Value) -> bool:
    """Return whether ReLUs alone read a value."""
    readers = list(value.consumers())
    return bool(readers) and not value.is_graph_output() and all(reader.op_type == "Relu" for reader in readers)
