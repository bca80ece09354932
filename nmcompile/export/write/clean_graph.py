"""Constants computed in the graph -> initializers; unread nodes and initializers are removed.

    Conv(x, w, Expand(CastLike(0, x), Shape(w)))  ->  Conv(x, w)

BatchNormalization stays a node: folded into a weight, it would no longer fit an integer grid.
"""

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

HAS_BIAS = frozenset({"Conv", "Gemm"})


def clean_graph(model: ir.Model, weights: Collection[str]) -> None:
    """Clean up, in place; the initializers named `weights` keep their names and the nodes that lay them out."""

    def should_fold(node: ir.Node) -> bool | None:
        reads_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if reads_weight and node.op_type != "Shape" else None

    optimizer.fold_constants(model, should_fold=should_fold)
    drop_identities(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    for node in model.graph:
        _drop_zero_bias(node)
    drop_unused(model)


def drop_identities(model: ir.Model) -> None:
    """Remove identities, except those that make an output of a loop's or a branch's body."""
    inner = (node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.graph is not model.graph)
    held = [node for node in inner if node.op_type == "Identity" and node.outputs[0].is_graph_output()]
    for node in held:
        node.op_type = "Held"  # else a value of the graph around a body could become its output, which is not valid
    common.IdentityEliminationPass()(model)
    for node in held:
        node.op_type = "Identity"


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs, in place."""
    common.RemoveUnusedNodesPass()(model)


def strip_origin(model: ir.Model) -> None:
    """Remove stack traces, source lines and paths of the machine that traced the model, in place."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


def _drop_zero_bias(node: ir.Node) -> None:
    if node.op_type in HAS_BIAS and len(node.inputs) == 3 and node.inputs[2] is not None:
        bias = node.inputs[2].const_value
        if bias is not None and not bias.numpy().any():
            node.resize_inputs(2)
