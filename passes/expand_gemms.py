"""Expand each planned conv/linear node into its forward, backward and update GEMM.

y = layer(x)   ->   forward   add_bias(gemm_forward(input, weight), bias)
                    backward  gemm_backward(grad_output, weight)
                    update    gemm_update(grad_output, input), bias_gradient(grad_output)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.generated_code import GeneratedModule
from nmcompile.ir.layers import Layer, SpatialLayer
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.plan import LayerPlan
from nmcompile.ir.program import Program, ThreeGraphs


@dataclass(frozen=True)
class ExpandGemms:
    """A pass that gives every layer of the plan three graphs that prune nothing.

    A convolution's GEMMs stay implicit: their geometry is the layer's, no im2col is written. Its backward GEMM also
    takes the input and its update GEMM the weight, for shape and memory format.
    """

    name: ClassVar[str] = "expand-gemms"

    def run(self, program: Program) -> None:
        for plan in program.plan:
            program.layers[plan.layer.name] = expand(plan)


def expand(plan: LayerPlan) -> ThreeGraphs:
    """Return the three dense graphs of one layer."""
    layer = plan.layer.of_call()
    graphs = {Phase.FORWARD: _forward(layer), Phase.BACKWARD: _backward(layer), Phase.UPDATE: _update(layer)}
    return ThreeGraphs(plan, {phase: GeneratedModule(torch.nn.Module(), graph) for phase, graph in graphs.items()})


def _forward(layer: Layer) -> fx.Graph:
    graph = fx.Graph()
    operands = graph.placeholder("input"), graph.placeholder("weight")
    output = ops.add_node(graph, NodeMeta("gemm", layer, Phase.FORWARD), "gemm_forward", ops.gemm_forward, operands)
    if layer.has_bias:
        # Placeholders come first; this one is the last of them.
        with graph.inserting_after(operands[1]):
            bias = graph.placeholder("bias")
        output = ops.add_node(graph, NodeMeta("bias", layer, Phase.FORWARD), "add_bias", ops.add_bias, (output, bias))
    graph.output((output,))
    return graph


def _backward(layer: Layer) -> fx.Graph:
    graph = fx.Graph()
    names = ["grad_output", "weight"] + (["input"] if isinstance(layer, SpatialLayer) else [])
    operands = tuple(graph.placeholder(name) for name in names)
    meta = NodeMeta("gemm", layer, Phase.BACKWARD)
    gradient = ops.add_node(graph, meta, "gemm_backward", ops.gemm_backward, operands)
    graph.output((gradient,))
    return graph


def _update(layer: Layer) -> fx.Graph:
    graph = fx.Graph()
    names = ["grad_output", "input"] + (["weight"] if isinstance(layer, SpatialLayer) else [])
    operands = tuple(graph.placeholder(name) for name in names)
    gemm, bias = NodeMeta("gemm", layer, Phase.UPDATE), NodeMeta("bias", layer, Phase.UPDATE)
    gradients = [ops.add_node(graph, gemm, "gemm_update", ops.gemm_update, operands)]
    if layer.has_bias:
        gradients.append(ops.add_node(graph, bias, "bias_gradient", ops.bias_gradient, (operands[0],)))
    graph.output(tuple(gradients))
    return graph
