"""Lookup of each layer's GEMM node by the weight that it reads."""

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from nmcompile.errors import ExportError, nearest
from nmcompile.export.deployed_layer import DeployedLayer

Doubles = npt.NDArray[np.float64]
CONVS = frozenset({"Conv", "ConvTranspose"})
GEMMS = CONVS | {"Gemm", "MatMul"}
LAYOUT = frozenset({"Transpose", "Identity", "Reshape", "Split", "Slice", "Squeeze", "Unsqueeze"})
WHOLE = "model"  # the name of a layer that is the whole model
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx notes the modules that a node comes from


@dataclass(frozen=True)
class LayerNode:
    """A layer and one of its nodes; a module that is called twice has two.

    Attributes:
        name: unique: the layer's name, for a second node with "#2".
        deployed: the layer.
        node: Conv, ConvTranspose, Gemm or MatMul; input 1 is the weight.
        weight: the initializer.
        layout: the values between the initializer and the node: transposed, split, ...
    """

    name: str
    deployed: DeployedLayer
    node: ir.Node
    weight: ir.Value
    layout: tuple[ir.Value, ...]

    @property
    def out_dim(self) -> int:
        """Return the dim of the weight, as the node reads it, that holds out-channels."""
        if self.node.op_type in CONVS:
            return self.deployed.layer.out_dim
        return 0 if self.node.op_type == "Gemm" and _is_transposed(self.node) else -1

    def absorbs(self, module: str) -> bool:
        """Return whether the model in torch computes as if the layer had absorbed that norm."""
        return bool(module) and module == self.deployed.norm

    def lay_out(self, weight: Doubles) -> Doubles:
        """Return a tensor of the stored weight's shape in the layout that the node reads."""
        for value in self.layout:
            weight = _evaluated(value, weight)
        return weight


def find_layers(
    model: ir.Model, layers: Mapping[str, DeployedLayer], aliases: Mapping[str, Collection[str]]
) -> list[LayerNode]:
    """Return the nodes of all layers, in the graph's order.

    Args:
        model: cleaned up.
        layers: by name.
        aliases: all names of each parameter; the graph knows it by one of them.

    Raises:
        ExportError: a layer without a node, or several layers that share a weight and cannot be told apart.
    """
    order = {node: index for index, node in enumerate(model.graph)}
    weights = {name: _weight(model, name, layer.weight.name, aliases) for name, layer in layers.items()}
    found = [site for name in layers for site in _sites(name, layers, weights)]
    return sorted(found, key=lambda site: order[site.node])


def _is_transposed(gemm: ir.Node) -> bool:
    attribute = gemm.attributes.get("transB")
    return attribute is not None and attribute.as_int() == 1


def module_of(node: ir.Node) -> str:
    """Return the innermost module whose forward the node belongs to."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _weight(model: ir.Model, layer: str, weight: str, aliases: Mapping[str, Collection[str]]) -> ir.Value:
    for name in aliases.get(weight, ()):
        if name in model.graph.initializers:
            return model.graph.initializers[name]
    known = nearest(weight, model.graph.initializers)
    raise ExportError(f"layer {layer!r}: the graph has no weight {weight!r}; {known}")


def _sites(name: str, layers: Mapping[str, DeployedLayer], weights: Mapping[str, ir.Value]) -> Iterator[LayerNode]:
    layer, weight = layers[name], weights[name]
    reads = list(_reads(weight, ()))
    modules = [one.module for other, one in layers.items() if weights[other] is weight]
    if len(modules) > 1:
        is_known = modules.count(layer.module) == 1
        reads = [(node, layout) for node, layout in reads if is_known and module_of(node) == layer.module]
    if not reads:
        raise ExportError(
            f"layer {name!r}: no Conv, ConvTranspose, Gemm or MatMul reads its weight {layer.weight.name!r}; the model "
            f"computes with it in another way, so leave the layer out with CompileConfig(layers={{{name!r}: None}})"
        )
    is_taken = (
        name.endswith(".weight") and name.removesuffix(".weight") in layers
    )  # by what that layer's weight becomes
    label = f"{name}#1" if is_taken else name or WHOLE
    for count, (node, layout) in enumerate(reads, start=1):
        yield LayerNode(label if count == 1 else f"{label}#{count}", layer, node, weight, layout)


def _reads(value: ir.Value, layout: tuple[ir.Value, ...]) -> Iterator[tuple[ir.Node, tuple[ir.Value, ...]]]:
    """Yield the GEMMs that read a constant, and the values between it and them."""
    for node, operand in value.uses():
        if node.op_type in GEMMS and operand == 1:
            yield node, layout
        elif node.op_type in LAYOUT and operand == 0 and all(i is None or i.const_value for i in node.inputs[1:]):
            for output in node.outputs:
                yield from _reads(output, (*layout, output))


def _evaluated(value: ir.Value, operand: Doubles) -> Doubles:
    node = value.producer()
    assert node is not None
    constants = [
        (i.name, i.const_value.numpy()) for i in node.inputs[1:] if i is not None and i.const_value is not None
    ]
    assert node.inputs[0] is not None
    feeds = {str(name): content for name, content in [(node.inputs[0].name, operand), *constants]}
    [result] = ReferenceEvaluator(ir.to_proto(node)).run([str(value.name)], feeds)
    return np.asarray(result)
