"""Rows of attention that may attend to nothing -> zeros, as in torch.

    Softmax(scores + Where(mask, 0, -3.4e38))  ->  Softmax(scores + Where(mask, 0, -inf)), with 0 in place of NaN

torch's `scaled_dot_product_attention` returns zeros for such rows, which padding before a prompt makes. For them
torch.onnx writes the average of all values for a boolean mask, and NaN for a mask of infinities. The NaN spreads from
then on: a probability of 0 times NaN is NaN.
"""

import numpy as np
import onnx_ir as ir

from nmcompile.export.write.build_nodes import add_initializer

ATTENTION = "aten.scaled_dot_product_attention"
HIERARCHY = "pkg.torch.onnx.class_hierarchy"  # where torch.onnx notes the operator that a node comes from


def mask_attention(model: ir.Model) -> None:
    """Make masked attention compute the same as in torch, in place."""
    for node in list(model.graph):
        if node.op_type == "Softmax" and ATTENTION in node.metadata_props.get(HIERARCHY, ""):
            scores = node.inputs[0]
            addition = None if scores is None else scores.producer()
            if addition is not None and addition.op_type == "Add":
                _mask(model, node, addition)


def _mask(model: ir.Model, softmax: ir.Node, addition: ir.Node) -> None:
    _write_infinities(model, addition)
    mask = addition.inputs[1]
    constant = None if mask is None or mask.const_value is None else mask.const_value.numpy()
    may_be_empty = constant is None or bool(np.isneginf(constant).all(-1).any())
    if may_be_empty and not any(user.op_type == "IsNaN" for user, _ in softmax.outputs[0].uses()):
        _guard(model, softmax)


def _write_infinities(model: ir.Model, addition: ir.Node) -> None:
    """Replace the least finite number of a boolean mask, which may be folded to a constant, by -infinity."""
    mask = addition.inputs[1]
    choice = None if mask is None else mask.producer()
    reader, operand = (choice, 2) if choice is not None and choice.op_type == "Where" else (addition, 1)
    value = reader.inputs[operand]
    if value is None or value.const_value is None:
        return
    content = value.const_value.numpy()
    is_least = content == np.finfo(content.dtype).min
    if is_least.any():
        content = np.where(is_least, np.array(-np.inf, content.dtype), content)
        reader.replace_input_with(operand, add_initializer(model, f"{value.name}.infinite", content))


def _guard(model: ir.Model, softmax: ir.Node) -> None:
    weights, users = softmax.outputs[0], list(softmax.outputs[0].uses())
    results = [weights, *softmax.inputs, *(output for user, _ in users for output in user.outputs)]
    dtype = next(value.dtype for value in results if value is not None and value.dtype is not None)
    zero = add_initializer(model, f"{weights.name}.zero", np.zeros((), dtype.numpy()))
    is_nan = ir.Node("", "IsNaN", [weights])
    guarded = ir.Node("", "Where", [is_nan.outputs[0], zero, weights])
    is_nan.outputs[0].name, guarded.outputs[0].name = f"{weights.name}.is_nan", f"{weights.name}.guarded"
    guarded.outputs[0].shape, guarded.outputs[0].type = weights.shape, weights.type
    softmax.append([is_nan, guarded])
    for user, operand in users:
        user.replace_input_with(operand, guarded.outputs[0])
