"""Names in a file for readers and tools: outputs by the fields of the model's result, layers with their patterns."""

from collections.abc import Sequence

import onnx_ir as ir

from nmcompile.export.write.find_layers import LayerNode

LAYER, PATTERN = "nmcompile.layer", "nmcompile.pattern"
"""Keys of a node's `metadata_props`, which Netron shows."""


def name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give the outputs their names, in place; one without a name, or whose name another value has, keeps its own."""
    taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    taken |= {value.name for node in model.graph for value in node.outputs}
    for value, name in zip(model.graph.outputs, names, strict=True):
        if name and name not in taken and not value.is_graph_input():
            taken.add(name)
            value.name = name


def describe_layers(sites: Sequence[LayerNode]) -> None:
    """Write each layer's name and pattern into its node, in place."""
    for site in sites:
        site.node.name = site.name
        pattern = site.deployed.weight.pattern
        site.node.metadata_props[LAYER] = site.name
        site.node.metadata_props[PATTERN] = "dense" if pattern is None else str(pattern)
