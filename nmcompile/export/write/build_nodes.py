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
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value], name: str, *, domain: str = "", axis: int | None = None
) -> ir.Value:
    """Insert a new node before another one and return its output."""
    new = ir.Node(domain, op_type, inputs, [] if axis is None else [ir.AttrInt64("axis", axis)], name=name)
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
